"""Move patches between packed order and dense attention windows: a partial permutation and its inverse (pure)."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Shaped

from sif_jax.parallel.partition import Axes, on_own_rows


def permute(
    x: Shaped[Array, "B I *rest"], source: Int[Array, "B O"], target: Int[Array, "B I"], axes: Axes = ()
) -> Shaped[Array, "B O *rest"]:
    """y[b, o] = x[b, source[b, o]], or 0 where the source is -1.

    `target` is the inverse (target[b, source[b, o]] = o, and -1 where x is not used), so that the gradient is a gather as
    well and not a scatter. `axes` as in `take_rows`.
    """
    return _permute(x, source, target, axes)


def take_rows(x: Shaped[Array, "B I *rest"], index: Int[Array, "B O"], axes: Axes = ()) -> Shaped[Array, "B O *rest"]:
    """y[b, o] = x[b, index[b, o]]; every device gathers from its own rows, and its own part of what `axes` name of the rest."""

    def take(x: Array, index: Array) -> Array:
        return jnp.take_along_axis(x, _expand(index, x.ndim), axis=1)

    return on_own_rows(take, x, index, axes=axes)


def _expand(index: Array, ndim: int) -> Array:
    return index.reshape(*index.shape, *(1,) * (ndim - 2))


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _permute(x: Array, source: Array, target: Array, axes: Axes) -> Array:
    rows = take_rows(x, jnp.maximum(source, 0), axes)
    return jnp.where(_expand(source >= 0, x.ndim), rows, jnp.zeros((), x.dtype))


def _forward(x: Array, source: Array, target: Array, axes: Axes):
    return _permute(x, source, target, axes), (source, target)


def _backward(axes: Axes, saved: tuple[Array, Array], cotangent: Array):
    source, target = saved
    return _permute(cotangent, target, source, axes), None, None


_permute.defvjp(_forward, _backward)
