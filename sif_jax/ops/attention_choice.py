"""Which attention backend this process uses: the platform's own where it computes what XLA computes (io)."""

from __future__ import annotations

import sys
from functools import cache
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from sif_jax.errors import InputError
from sif_jax.ops.attention_backends import Backend, self_attention

NATIVE: dict[str, Backend] = {"tpu": "splash", "gpu": "cudnn"}  # xla runs everywhere
# Relative; both sides in bfloat16, whose step is 2**-8. A segment that is ignored gives an error near 1.
TOLERANCE = 0.03


@cache
def choose_backend(name: Literal["auto"] | Backend, dtype: str) -> Backend:
    """The backend for a model of `dtype`, tried once per process and told on stderr.

    Raises:
      InputError: the backend named cannot run here, or computes something else.
    """
    platform = jax.default_backend()
    wanted = NATIVE.get(platform, "xla") if name == "auto" else name
    problem = why_not(wanted, dtype)
    if problem and name != "auto":
        raise InputError(problem, value=name, fix="set model.attention=auto")
    chosen: Backend = "xla" if problem else wanted
    if jax.process_index() == 0:
        print(f"attention: {chosen} ({'; '.join(filter(None, [platform, problem]))})", file=sys.stderr)
    return chosen


def why_not(backend: Backend, dtype: str) -> str | None:
    """What is wrong with a backend here: packed rows, forward and gradient, are held against XLA's."""
    if backend == "xla":
        return None
    platform = jax.default_backend()
    if NATIVE.get(platform) != backend:
        return f"{backend} attention does not run on {platform}"
    if backend == "cudnn" and dtype == "float32":
        return "cudnn attention computes in bfloat16 only"
    try:
        errors = [_error(backend, dtype, causal=causal, dim=dim) for causal, dim in [(True, 128), (False, 80)]]
    except (RuntimeError, ValueError) as problem:  # what JAX, XLA and Mosaic raise for what they cannot lower or run
        return f"{backend} attention fails: {problem}"
    error = float(np.max(errors))
    return None if error <= TOLERANCE else f"{backend} attention is off by {error:.2g} of the largest value"


def _error(backend: Backend, dtype: str, *, causal: bool, dim: int) -> float:
    """The largest difference from XLA, relative to the largest value, over the output and the three gradients."""
    rng = np.random.default_rng(0)
    shapes = [(2, 256, 4, dim), (2, 2, 256, dim), (2, 2, 256, dim), (2, 256, 4, dim)]
    q, k, v, weights = (jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes)
    segments = jnp.asarray([np.repeat([1, 2, 0], [100, 90, 66]), np.repeat([1, 0], [30, 226])], jnp.int32)

    def outputs(backend: Backend, q: Array, k: Array, v: Array, weights: Array) -> tuple[Array, ...]:
        def attend(q, k, v):
            return self_attention(q, k, v, segments, causal=causal, backend=backend)

        out, pull = jax.vjp(attend, q, k, v)
        return out, *pull(weights)

    ours, theirs = (jax.jit(outputs, static_argnums=0)(name, q, k, v, weights) for name in (backend, "xla"))
    # Not max(), which would lose a NaN.
    return float(
        np.max([_relative(np.asarray(a, np.float32), np.asarray(b, np.float32)) for a, b in zip(ours, theirs)])
    )


def _relative(ours: np.ndarray, theirs: np.ndarray) -> float:
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())
