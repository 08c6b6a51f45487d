"""One LoRA gradient of a small random Qwen2.5-VL, on a device and by another program on the CPU (io)."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sif_jax.bench.workload import abstract_policy, random_batch
from sif_jax.models.qwen2_5_vl.config import Qwen2_5_VLConfig, TextConfig, VisionConfig
from sif_jax.ops.scan import Remat
from sif_jax.training.sft import make_gradients

Device = Any  # jax.Device, which type checkers take for a variable
# Heads as wide as the published model's, everything else small.
ARCHITECTURE = Qwen2_5_VLConfig(
    TextConfig(512, 256, 384, 1, 2, 1, 1e-6, 1e6, (16, 24, 24), False),
    VisionConfig(1, 160, 240, 2, 256, (0,)),
    508,
    509,
    510,
    511,
)


def gradient_error(device: Device) -> float:
    """The largest difference of loss and gradients, relative to the largest value of each array.

    The reference recomputes every layer in its backward pass, so on a CPU, too, two different programs are compared.
    """
    ours, reference = _gradients(device, "none"), _gradients(jax.devices("cpu")[0], "full")
    return max(jax.tree.leaves(jax.tree.map(relative_error, ours, reference)))


def relative_error(ours: Any, reference: Any) -> float:
    """NaN counts as infinite."""
    error = float(np.max(np.abs(ours - reference)) / max(np.max(np.abs(reference)), 1e-30))
    return error if error == error else float("inf")


def _gradients(device: Device, remat: Remat) -> Any:
    graphdef, *abstract = abstract_policy(ARCHITECTURE, remat=remat)
    batch = random_batch(ARCHITECTURE, rows=1, tokens=128, image_px=(140, 112))
    with jax.default_device(device), jax.default_matmul_precision("highest"):
        trainable, frozen, batch = jax.device_put((*_filled(abstract), batch), device)
        step = make_gradients(graphdef, dropout=False)
        gradients, sums = step(None, trainable, frozen, batch, jax.random.key(0))
        return jax.tree.map(np.asarray, (gradients, jnp.stack(sums)))


def _filled(abstract: Any) -> Any:
    """Random parameters; LoRA's B, too, which starts as 0 and would make every gradient of A 0."""
    rng = np.random.default_rng(0)

    def values(x: Any) -> np.ndarray:
        fan_in = x.shape[-2] if x.ndim > 1 else 1
        return rng.normal(size=x.shape, scale=fan_in**-0.5).astype(x.dtype)

    return jax.tree.map(values, abstract)
