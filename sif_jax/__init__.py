"""SIFThinker in JAX. Names load on first use, so that importing a host module does not import jax (host)."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sif_jax import rewards
    from sif_jax.api import VLM, Completion, load
    from sif_jax.sif.grammar import parse

_HOME = {
    "load": "sif_jax.api",
    "VLM": "sif_jax.api",
    "Completion": "sif_jax.api",
    "parse": "sif_jax.sif.grammar",
}

__version__ = "0.1.0"
__all__ = ["VLM", "Completion", "load", "parse", "rewards"]


def __getattr__(name: str) -> Any:
    if name == "rewards":
        return importlib.import_module("sif_jax.rewards")
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module 'sif_jax' has no attribute {name!r}")
