"""The bandwidth of the device's memory, as a program of ours can reach it (io)."""

from __future__ import annotations

import time

import jax
import jax.numpy as jnp

BYTES = {"cpu": 2**30}  # larger than any cache
DEFAULT_BYTES = 2**31
REPEATS = 10


def measure_bandwidth() -> float:
    """Bytes per second read by the sum of a large array; the fastest of several.

    A decoding step reads weights and keys and writes next to nothing, so reading is what it is held against.
    """
    count = BYTES.get(jax.default_backend(), DEFAULT_BYTES) // 4
    x = jnp.ones(count, jnp.float32)
    read = jax.jit(lambda x: x.reshape(-1, 2**16).sum(0).sum())
    jax.block_until_ready(read(x))
    seconds = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        jax.block_until_ready(read(x))
        seconds.append(time.perf_counter() - began)
    return x.nbytes / min(seconds)
