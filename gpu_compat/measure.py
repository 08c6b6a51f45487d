"""Measured rates of the devices: memory, matrix products, collectives (io)."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

Device = Any  # jax.Device, which type checkers take for a variable
ROUNDS = 3
CALLS = 10  # of each round, queued at once, so that starting them costs little


class Sizes(NamedTuple):
    stream_bytes: int
    matmul: int  # side of the square matrices
    reduce_bytes: int  # of each device


SIZES = {"gpu": Sizes(2**30, 8192, 2**28), "cpu": Sizes(2**26, 512, 2**22)}


def seconds_per_call(step: Callable[[Any], Any], start: Any) -> float:
    """The best round, after one call that compiles."""
    value = jax.block_until_ready(step(start))
    best = float("inf")
    for _ in range(ROUNDS):
        began = time.perf_counter()
        for _ in range(CALLS):
            value = step(value)
        jax.block_until_ready(value)
        best = min(best, (time.perf_counter() - began) / CALLS)
    return best


def memory_gbps(device: Device, sizes: Sizes) -> float:
    """Bytes read and written by x + 1, GB/s."""
    x = jax.device_put(np.zeros(sizes.stream_bytes // 4, np.float32), device)
    return 2 * x.nbytes / seconds_per_call(jax.jit(lambda x: x + 1), x) / 1e9


def matmul_tflops(device: Device, sizes: Sizes, dtype: str, precision: str | None = None) -> float:
    """2 n³ operations of one square product, TFLOP/s.

    Both factors are arguments: XLA compiles a program around a constant of this size for minutes.
    """
    side = sizes.matmul
    weights = np.random.default_rng(0).normal(size=(side, side), scale=side**-0.5).astype(np.float32)
    w = jax.device_put(jnp.asarray(weights, dtype), device)
    product = jax.jit(partial(jnp.matmul, precision=precision))
    return 2 * side**3 / seconds_per_call(lambda x: product(x, w), w) / 1e12


def all_reduce_gbps(devices: Sequence[Device], sizes: Sizes) -> float:
    """Bus bandwidth of a sum over all devices, GB/s: each must send and receive 2 (n - 1) / n of its array."""
    count, mesh = len(devices), Mesh(np.array(devices), ("all",))
    rows = PartitionSpec("all")
    x = jax.device_put(np.ones((count, sizes.reduce_bytes // 4), np.float32), NamedSharding(mesh, rows))

    def mean(x: Array) -> Array:
        return jax.lax.psum(x, "all") / count

    reduce = jax.jit(jax.shard_map(mean, mesh=mesh, in_specs=rows, out_specs=rows, check_vma=False))
    return 2 * (count - 1) / count * sizes.reduce_bytes / seconds_per_call(reduce, x) / 1e9
