"""A frozen decoder with every layer's weights in arrays of their own, for programs that write its layers out (io).

XLA hands a library's matrix product no part of a stack: on GPUs it copies each layer's weights out of theirs, in every step, and
keeps the copies for the backward pass (docs/results/h100.md).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Shaped

DECODER_LAYERS = ("decoder", "layers")


class LayerArrays(NamedTuple):
    """The frozen state without the decoder's layers, and of each layer a state."""

    rest: nnx.State
    layers: tuple[nnx.State, ...]


def take_apart(frozen: nnx.State) -> LayerArrays:
    """One stack after the other, which is used up: little more memory is needed than the largest of them."""
    return _apart(frozen, _unstacked)


def put_together(frozen: nnx.State | LayerArrays) -> nnx.State:
    """The inverse, for the end of a run; it uses up the layers' arrays. A state is left as it is."""
    return _together(frozen, _restacked) if isinstance(frozen, LayerArrays) else frozen


def stacked(frozen: nnx.State | LayerArrays) -> nnx.State:
    """The state that a model is merged from, inside a program: where the layers are written out, each reads its own arrays and
    nothing is stacked."""
    return _together(frozen, jnp.stack) if isinstance(frozen, LayerArrays) else frozen


def abstract_layers(frozen: nnx.State) -> LayerArrays:
    """`take_apart` of shapes, types and places."""

    def parts(stack: Any) -> list[Any]:
        return [jax.ShapeDtypeStruct(stack.shape[1:], stack.dtype, sharding=_of_part(stack.sharding))] * stack.shape[0]

    return _apart(frozen, parts)


def _apart(frozen: nnx.State, unstack: Callable[[Any], list[Any]]) -> LayerArrays:
    stacks, rest = nnx.split_state(frozen, lambda path, _: path[: len(DECODER_LAYERS)] == DECODER_LAYERS, ...)
    leaves, structure = jax.tree.flatten(stacks)
    parts = zip(*map(unstack, leaves), strict=True)
    return LayerArrays(rest, tuple(jax.tree.unflatten(structure, part) for part in parts))


def _together(arrays: LayerArrays, stack: Callable[[list[Any]], Any]) -> nnx.State:
    """A frozen state without the decoder's layers, as of a full fine-tune, is its own rest."""
    if not arrays.layers:
        return arrays.rest
    return nnx.merge_state(arrays.rest, jax.tree.map(lambda *parts: stack(list(parts)), *arrays.layers))


def _unstacked(stack: Shaped[Array, "layer *rest"]) -> list[Shaped[Array, "*rest"]]:
    parts = jax.jit(lambda x: list(jnp.unstack(x)), out_shardings=_of_part(stack.sharding))(stack)
    jax.block_until_ready(parts)
    stack.delete()
    return parts


def _restacked(parts: list[Shaped[Array, "*rest"]]) -> Shaped[Array, "layer *rest"]:
    stack = jax.block_until_ready(jax.jit(jnp.stack, out_shardings=_of_stack(parts[0].sharding))(parts))
    for part in parts:
        part.delete()
    return stack


def _of_part(where: Any) -> Any:
    return NamedSharding(where.mesh, PartitionSpec(*where.spec[1:])) if isinstance(where, NamedSharding) else None


def _of_stack(where: Any) -> Any:
    return NamedSharding(where.mesh, PartitionSpec(None, *where.spec)) if isinstance(where, NamedSharding) else None
