"""The attention backends that run on this machine, for the tests that every one must pass."""

from collections.abc import Iterator
from contextlib import contextmanager

import jax
import pytest

from sif_jax.ops import attention_backends, flash_attention

on_a_gpu = pytest.mark.skipif(jax.default_backend() != "gpu", reason="cuDNN needs a GPU")
RUNNABLE = [
    "xla",
    "xla in parts",
    "xla in chunks",
    "flash",
    "flash in blocks",
    "splash",
    pytest.param("cudnn", marks=on_a_gpu),
]


@contextmanager
def traced_as(name: str) -> Iterator[None]:
    """Sizes with which short rows take the way of long ones: parts and chunks of XLA's queries, several of splash's and
    flash's blocks."""
    with pytest.MonkeyPatch.context() as patch:
        if name == "xla in parts":
            patch.setattr(attention_backends, "CAUSAL_QUERIES", 10)
        if name == "xla in chunks":
            patch.setattr(attention_backends, "LOGITS_BYTES", 2**14)
        if name == "flash in blocks":
            patch.setattr(flash_attention, "MIN_QUERIES", 10)
            patch.setattr(flash_attention, "BLOCK_BYTES", 2**14)
        patch.setattr(attention_backends, "SPLASH_BLOCK", 128)
        yield
