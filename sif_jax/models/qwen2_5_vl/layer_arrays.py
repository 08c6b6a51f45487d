"""A frozen decoder with every layer's weights in arrays of their own, for programs that write its layers out (io).

XLA hands a library's matrix product no part of a stack: on GPUs it copies each layer's weights out of theirs, in every step, and
keeps the copies for the backward pass (docs/results/h100.md). A rollout decodes from the same arrays, and needs no second copy.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Shaped

from sif_jax.models.qwen2_5_vl.model import Qwen2_5_VL

DECODER_LAYERS = ("decoder", "layers")


class LayerArrays(NamedTuple):
    """A state without the decoder's layers, and of each layer a state."""

    rest: nnx.State
    layers: tuple[nnx.State, ...]


AnyState = nnx.State | LayerArrays  # of a model, or a part of it: its layers stacked, or apart


def take_apart(frozen: nnx.State) -> LayerArrays:
    """One stack after the other, which is used up: little more memory is needed than the largest of them."""
    return _apart(frozen, _unstacked)


def put_together(frozen: AnyState) -> nnx.State:
    """The inverse, for the end of a run; it uses up the layers' arrays. A state is left as it is."""
    return _together(frozen, _restacked) if isinstance(frozen, LayerArrays) else frozen


def merge_model(graphdef: nnx.GraphDef, *states: AnyState, copy: bool = False) -> Qwen2_5_VL:
    """`nnx.merge`, inside a program: where the layers are written out, each reads its own arrays and nothing is stacked."""
    whole = (_together(state, jnp.stack) if isinstance(state, LayerArrays) else state for state in states)
    return nnx.merge(graphdef, *whole, copy=copy)


def are_apart(states: tuple[AnyState, ...]) -> bool:
    """Whether one of them holds the decoder's layers as arrays of their own."""
    return any(isinstance(state, LayerArrays) and state.layers for state in states)


def separate_layers(states: tuple[AnyState, ...]) -> tuple[nnx.State, ...]:
    """The weights of each layer as arrays of their own; those that are not yet are copied."""
    return join_layers(states, copy_layers(stacked_states(states)))


def stacked_states(states: tuple[AnyState, ...]) -> tuple[nnx.State, ...]:
    return tuple(state for state in states if not isinstance(state, LayerArrays))


@jax.jit
def copy_layers(states: tuple[nnx.State, ...]) -> tuple[nnx.State, ...]:
    """Each layer of stacks, as a copy; none where the states hold nothing of the decoder's layers."""
    return _merged([_apart(state, lambda x: list(jnp.unstack(x))).layers for state in states])


def join_layers(states: tuple[AnyState, ...], copies: tuple[nnx.State, ...]) -> tuple[nnx.State, ...]:
    """Each layer whole: what was copied of it, and what the states hold apart."""
    return _merged([copies, *(state.layers for state in states if isinstance(state, LayerArrays))])


def abstract_layers(frozen: nnx.State) -> LayerArrays:
    """`take_apart` of shapes, types and places."""

    def parts(stack: Any) -> list[Any]:
        return [jax.ShapeDtypeStruct(stack.shape[1:], stack.dtype, sharding=_of_part(stack.sharding))] * stack.shape[0]

    return _apart(frozen, parts)


def _apart(state: nnx.State, unstack: Callable[[Any], list[Any]]) -> LayerArrays:
    stacks, rest = nnx.split_state(state, lambda path, _: path[: len(DECODER_LAYERS)] == DECODER_LAYERS, ...)
    if not stacks:
        return LayerArrays(rest, ())
    decoder, layers = DECODER_LAYERS
    leaves, structure = jax.tree.flatten(stacks[decoder][layers])
    parts = zip(*map(unstack, leaves), strict=True)
    return LayerArrays(rest, tuple(jax.tree.unflatten(structure, part) for part in parts))


def _merged(parts: list[tuple[nnx.State, ...]]) -> tuple[nnx.State, ...]:
    return tuple(nnx.merge_state(*each) for each in zip(*filter(None, parts), strict=True))


def _together(arrays: LayerArrays, stack: Callable[[list[Any]], Any]) -> nnx.State:
    """A frozen state without the decoder's layers, as of a full fine-tune, is its own rest."""
    if not arrays.layers:
        return arrays.rest
    decoder, layers = DECODER_LAYERS
    stacks = jax.tree.map(lambda *parts: stack(list(parts)), *arrays.layers)
    return nnx.merge_state(arrays.rest, nnx.State({decoder: {layers: stacks}}))


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
