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


def put_together(arrays: LayerArrays) -> nnx.State:
    """The inverse, for the end of a run; it uses up the layers' arrays."""
    return _together(arrays, _restacked)


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
    rest, layers = [], None
    for path, leaf in nnx.to_flat_state(frozen):
        if path[: len(DECODER_LAYERS)] != DECODER_LAYERS:
            rest.append((path, leaf))
            continue
        parts = [(path, leaf.replace(part)) for part in unstack(leaf.get_value())]
        layers = [[] for _ in parts] if layers is None else layers
        for layer, part in zip(layers, parts, strict=True):
            layer.append(part)
    return LayerArrays(nnx.from_flat_state(rest), tuple(nnx.from_flat_state(layer) for layer in layers or []))


def _together(arrays: LayerArrays, stack: Callable[[list[Any]], Any]) -> nnx.State:
    layers = [nnx.to_flat_state(layer) for layer in arrays.layers]
    leaves = [(each[0][0], each[0][1].replace(stack([leaf.get_value() for _, leaf in each]))) for each in zip(*layers)]
    return nnx.from_flat_state([*nnx.to_flat_state(arrays.rest), *leaves])


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
