"""How fast a device can multiply matrices: by its data sheet, or measured where it has none (io)."""

from __future__ import annotations

import time
from typing import NamedTuple

import jax
import jax.numpy as jnp

from sif_jax.parallel.chips import CARDS, TPUS

TPU_KINDS = {"TPU v5 lite": "v5e", "TPU v5": "v5p", "TPU v6 lite": "v6e"}
DATA_SHEET = {card.name: card.bfloat16_tflops * 1e12 for card in CARDS.values()} | {
    kind: TPUS[name].flops for kind, name in TPU_KINDS.items()
}  # by JAX's device_kind
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
