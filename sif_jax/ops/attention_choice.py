"""Which attention backend this process uses: the platform's own where it computes what XLA computes (io)."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from sif_jax.errors import InputError
from sif_jax.ops.attention_backends import Backend, self_attention
from sif_jax.ops.group_attention import group_attention

NATIVE: dict[str, Backend] = {"tpu": "splash", "gpu": "cudnn", "cpu": "flash"}
EVERYWHERE: frozenset[Backend] = frozenset({"xla", "flash"})
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
    """What is wrong with a backend here: packed rows and completions, forward and gradient, are held against XLA's."""
    if backend in EVERYWHERE:
        return None
    platform = jax.default_backend()
    if NATIVE.get(platform) != backend:
        return f"{backend} attention does not run on {platform}"
    if backend == "cudnn" and dtype == "float32":
        return "cudnn attention computes in bfloat16 only"
    cases = [(True, 128, PACKED), (True, 128, ALONE), (False, 80, PACKED)]
    try:
        errors = [*(_error(backend, dtype, *case) for case in cases), _group_error(backend, dtype)]
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

    def attend(backend: Backend, q: Array, k: Array, v: Array) -> Array:
        out = self_attention(q, k, v, segments, causal=causal, backend=backend, packed=packed)
        return out if packed else jnp.where(real, out, 0)  # what padding sees is left open

    return _largest_difference(attend, backend, arrays)


def _group_error(backend: Backend, dtype: str) -> float:
    """The same of completions that continue prompts of several lengths."""
    rng = np.random.default_rng(0)
    prefix, own, queries = (2, 2, LENGTH, 128), (2, 3, 2, 100, 128), (2, 3, 100, 4, 128)
    arrays = [jnp.asarray(rng.normal(size=shape), dtype) for shape in (queries, prefix, prefix, own, own, queries)]
    visible = jnp.arange(LENGTH)[None] < jnp.asarray([[LENGTH], [70]])

    def attend(backend: Backend, q: Array, prefix_k: Array, prefix_v: Array, k: Array, v: Array) -> Array:
        return group_attention(q, prefix_k, prefix_v, visible, k, v, backend=backend)

    return _largest_difference(attend, backend, arrays)


def _largest_difference(attend: Callable[..., Array], backend: Backend, arrays: Sequence[Array]) -> float:
    """Over the output and the gradient by each array but the last, which is the output's cotangent."""

    # The arrays are arguments, or the compiler would fold everything into a constant, computed on the host.
    @partial(jax.jit, static_argnums=0)
    def outputs(backend: Backend, *arrays: Array) -> tuple[Array, ...]:
        out, pull = jax.vjp(partial(attend, backend), *arrays[:-1])
        return out, *pull(arrays[-1])

    pairs = zip(outputs(backend, *arrays), outputs("xla", *arrays))
    return float(jnp.stack([jnp.abs(ours - theirs).max() / jnp.abs(theirs).max() for ours, theirs in pairs]).max())
