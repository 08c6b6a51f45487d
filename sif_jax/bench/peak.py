"""How fast a device can multiply matrices: by its data sheet, or measured where it has none (io)."""

from __future__ import annotations

import time
from typing import NamedTuple

import jax
import jax.numpy as jnp

# Dense bfloat16 with float32 accumulation, by JAX's device_kind: NVIDIA's and Google Cloud's data sheets, 2026.
DATA_SHEET = {
    "NVIDIA H20": 148e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA L40S": 362e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
}
SIDES = {"cpu": 2048}
DEFAULT_SIDE = 8192
REPEATS = 8


class Peak(NamedTuple):
    flops: float  # per second
    source: str


def peak_of(device_kind: str, dtype: str) -> Peak:
    """The data sheet's where it has this device and type, else the fastest of several products in this process."""
    if dtype == "bfloat16" and device_kind in DATA_SHEET:
        return Peak(DATA_SHEET[device_kind], "data sheet")
    side = SIDES.get(jax.default_backend(), DEFAULT_SIDE)
    return Peak(matmul_rate(side, dtype), f"fastest {side}³ {dtype} product in the same run")


def matmul_rate(side: int, dtype: str) -> float:
    """Operations per second of a square product."""
    x = jax.random.normal(jax.random.key(0), (side, side), jnp.dtype(dtype)) / side**0.5
    product = jax.jit(lambda x, y: x @ y)
    y = jax.block_until_ready(product(x, x))
    seconds = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        y = jax.block_until_ready(product(x, y))
        seconds.append(time.perf_counter() - began)
    return 2 * side**3 / min(seconds)
