"""Exact bytes of a model's parameters, from its config.json, without weights (host)."""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from sif_jax.config import TrainConfig
from sif_jax.models.qwen2_5_vl.config import Qwen2_5_VLConfig
from sif_jax.models.qwen2_5_vl.lora import add_lora, split_trainable
from sif_jax.models.qwen2_5_vl.model import Qwen2_5_VL


class ModelSize(NamedTuple):
    parameters: int  # without adapters
    frozen_bytes: int
    trainable: int  # parameters
    trainable_bytes: int
    layer_bytes: int  # of one decoder layer, what a scan over split layers gathers at a time
    head_bytes: int


def model_size(architecture: Qwen2_5_VLConfig, config: TrainConfig) -> ModelSize:
    """What `training.policy_files.open_policy` would hold for this config."""
    model = nnx.eval_shape(lambda: _policy(architecture, config))
    lora = config.lora is not None
    _, trainable, frozen = split_trainable(model, lora=lora, freeze_vision=config.freeze_vision)
    layers = _bytes(nnx.state(model.decoder.layers)) // architecture.text.num_hidden_layers
    head = model.embed_tokens if model.lm_head is None else model.lm_head
    adapters = _count(trainable) if lora else 0
    return ModelSize(
        _count(trainable) + _count(frozen) - adapters,
        _bytes(frozen),
        _count(trainable),
        _bytes(trainable),
        layers,
        _bytes(head),
    )


def _policy(architecture: Qwen2_5_VLConfig, config: TrainConfig) -> Qwen2_5_VL:
    rngs = nnx.Rngs(params=0)
    model = Qwen2_5_VL(architecture, param_dtype=jnp.dtype(config.model.dtype), rngs=rngs)
    if config.lora:
        add_lora(model, **config.lora.model_dump(), freeze_vision=config.freeze_vision, rngs=rngs)
    return model


def _count(tree: object) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def _bytes(tree: object) -> int:
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
