"""The policy that a run started from, which the KL holds it to (pure).

Adapters are switched off: the base model is another graph over the frozen weights that the policy holds already. Only a
full fine-tune, which has no such base, keeps a copy of the weights it trains.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Shaped

from sif_jax.models.qwen2_5_vl.layer_arrays import AnyState, merge_model
from sif_jax.models.qwen2_5_vl.lora import linear_layers
from sif_jax.models.qwen2_5_vl.model import Batch
from sif_jax.ops.packing import Packing
from sif_jax.training.policy import completion_logprobs


class Reference(NamedTuple):
    graphdef: nnx.GraphDef
    states: tuple[AnyState, ...]


def reference_of(graphdef: nnx.GraphDef, trainable: nnx.State, frozen: AnyState) -> Reference:
    """The policy as it is now, or its base where `trainable` are adapters."""
    model = nnx.eval_shape(lambda *states: merge_model(graphdef, *states, copy=True), trainable, frozen)
    layers = linear_layers(model).values()
    if all(layer.lora_a is None for layer in layers):
        return Reference(graphdef, (jax.tree.map(jnp.copy, trainable), frozen))
    for layer in layers:
        layer.lora_a = layer.lora_b = nnx.data(None)
    return Reference(nnx.graphdef(model), (frozen,))


@partial(jax.jit, static_argnames=("graphdef", "temperature"))
def reference_logprobs(
    graphdef: nnx.GraphDef,
    states: tuple[AnyState, ...],
    batch: Batch,
    features: Shaped[Array, "P I D"] | None,
    ids: Int[Array, "P M T"],
    token_mask: Bool[Array, "P M T"] | None = None,
    packing: Packing | None = None,
    *,
    temperature: float,
) -> Float[Array, "P M T"]:
    model = merge_model(graphdef, *states)
    return completion_logprobs(model, batch, features, ids, token_mask, packing=packing, temperature=temperature)[0]
