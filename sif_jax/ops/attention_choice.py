"""Which attention backend this process uses: the platform's own where it computes what XLA computes (io)."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import cache, partial
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
LENGTH = 256
PACKED, ALONE = ((100, 90), (30,)), ((256,), (190,))  # lengths of the segments of each row


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
        errors = [
            _error(backend, dtype, *case) for case in [(True, 128, PACKED), (True, 128, ALONE), (False, 80, PACKED)]
        ]
    except (RuntimeError, ValueError) as problem:  # what JAX, XLA and Mosaic raise for what they cannot lower or run
        return f"{backend} attention fails: {str(problem).partition(chr(10))[0]}"
    if all(error <= TOLERANCE for error in errors):
        return None
    return f"{backend} attention is off by {np.max(errors):.2g} of the largest value"


def _error(backend: Backend, dtype: str, causal: bool, dim: int, rows: Sequence[Sequence[int]]) -> float:
    """The largest difference from XLA, relative to the largest value, over the output and the three gradients.

    `rows` are the lengths of each row's segments.
    """
    rng = np.random.default_rng(0)
    shapes = [(2, LENGTH, 4, dim), (2, 2, LENGTH, dim), (2, 2, LENGTH, dim), (2, LENGTH, 4, dim)]
    arrays = [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]
    numbered = [np.repeat(np.arange(1, len(row) + 1), row) for row in rows]
    segments = jnp.asarray([np.pad(row, (0, LENGTH - len(row))) for row in numbered], jnp.int32)
    packed, real = rows is PACKED, (segments > 0)[:, :, None, None]

    # The arrays are arguments, or the compiler would fold everything into a constant, computed on the host.
    @partial(jax.jit, static_argnums=0)
    def outputs(backend: Backend, q: Array, k: Array, v: Array, cotangent: Array) -> tuple[Array, ...]:
        def attend(q: Array, k: Array, v: Array) -> Array:
            out = self_attention(q, k, v, segments, causal=causal, backend=backend, packed=packed)
            return out if packed else jnp.where(real, out, 0)  # what padding sees is left open

        out, pull = jax.vjp(attend, q, k, v)
        return out, *pull(cotangent)

    pairs = zip(outputs(backend, *arrays), outputs("xla", *arrays))
    return float(jnp.stack([jnp.abs(ours - theirs).max() / jnp.abs(theirs).max() for ours, theirs in pairs]).max())
