"""Move patches between packed order and dense attention windows: a partial permutation and its inverse (pure)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Shaped

from sif_jax.parallel.partition import on_own_rows


@jax.custom_vjp
def permute(
    x: Shaped[Array, "B I *rest"], source: Int[Array, "B O"], target: Int[Array, "B I"]
) -> Shaped[Array, "B O *rest"]:
    """y[b, o] = x[b, source[b, o]], or 0 where the source is -1.

    `target` is the inverse (target[b, source[b, o]] = o, and -1 where x is not used), so that the gradient is a gather as
    well and not a scatter.
    """
    rows = take_rows(x, jnp.maximum(source, 0))
    return jnp.where(_expand(source >= 0, x.ndim), rows, jnp.zeros((), x.dtype))


def take_rows(x: Shaped[Array, "B I *rest"], index: Int[Array, "B O"]) -> Shaped[Array, "B O *rest"]:
    """y[b, o] = x[b, index[b, o]]; every device gathers from its own rows."""

    def take(x: Array, index: Array) -> Array:
        return jnp.take_along_axis(x, _expand(index, x.ndim), axis=1)

    return on_own_rows(take, x, index)


def _expand(index: Array, ndim: int) -> Array:
    return index.reshape(*index.shape, *(1,) * (ndim - 2))


def _forward(x: Array, source: Array, target: Array):
    return permute(x, source, target), (source, target)


def _backward(saved: tuple[Array, Array], cotangent: Array):
    source, target = saved
    return permute(cotangent, target, source), None, None


permute.defvjp(_forward, _backward)
