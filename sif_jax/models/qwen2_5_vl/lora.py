"""Low-rank adapters on the linear layers, and the split of a model into trainable and frozen state (pure)."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from sif_jax.errors import InputError
from sif_jax.models.qwen2_5_vl.layers import Linear, LoRAParam
from sif_jax.models.qwen2_5_vl.model import Qwen2_5_VL


def linear_layers(model: Qwen2_5_VL) -> Iterator[tuple[str, Linear]]:
    """Every linear layer with its dotted name; the layers of a stack count once."""
    for path, module in nnx.iter_modules(model):
        if isinstance(module, Linear):
            yield ".".join(map(str, path)), module


def add_lora(
    model: Qwen2_5_VL, *, rank: int, alpha: float, dropout: float, targets: str, freeze_vision: bool, rngs: nnx.Rngs
) -> None:
    """Give the target layers factors A ~ U(-1/√d_in, 1/√d_in) and B = 0, as PEFT does, in float32.

    `targets` is "all-linear" (every linear layer but the head), "language" (the decoder's), or a regular expression that
    must match a whole dotted name such as "decoder.layers.q_proj".

    Raises:
      InputError: no layer matches.
    """
    chosen = [
        layer
        for name, layer in linear_layers(model)
        if _is_target(name, targets) and not (freeze_vision and name.startswith("vision."))
    ]
    if not chosen:
        names = ", ".join(name for name, _ in linear_layers(model))
        raise InputError(
            "no layer to adapt", value=targets, expected=f"a pattern for one of {names}", fix="lora.targets"
        )
    for layer in chosen:
        *stacked, d_in, d_out = layer.kernel[...].shape
        bound = d_in**-0.5
        a = jax.random.uniform(rngs.params(), (*stacked, d_in, rank), jnp.float32, -bound, bound)
        layer.lora_a = nnx.data(LoRAParam(a))
        layer.lora_b = nnx.data(LoRAParam(jnp.zeros((*stacked, rank, d_out), jnp.float32)))
        layer.lora_scale = alpha / rank
        layer.lora_dropout = dropout


def _is_target(name: str, targets: str) -> bool:
    if targets == "all-linear":
        return True
    if targets == "language":
        return name.startswith("decoder.")
    return re.fullmatch(targets, name) is not None


def merge_lora(model: Qwen2_5_VL) -> None:
    """Fold each adapter into its weight, W + (alpha / R) A B, and drop it."""
    for _, layer in linear_layers(model):
        if layer.lora_a is None or layer.lora_b is None:
            continue
        kernel = layer.kernel[...]
        delta = layer.lora_scale * jnp.matmul(layer.lora_a[...], layer.lora_b[...], precision="highest")
        layer.kernel[...] = (kernel.astype(jnp.float32) + delta).astype(kernel.dtype)
        layer.lora_a = layer.lora_b = nnx.data(None)


def split_trainable(model: Qwen2_5_VL, *, lora: bool, freeze_vision: bool) -> tuple[nnx.GraphDef, nnx.State, nnx.State]:
    """(graphdef, trainable, frozen): the adapters, or without LoRA every weight, minus the vision tower if it is frozen."""

    def trainable(path: Any, value: Any) -> bool:
        is_adapter = isinstance(value, LoRAParam) or getattr(value, "type", None) is LoRAParam
        return is_adapter == lora and not (freeze_vision and path[0] == "vision")

    graphdef, trained, frozen = nnx.split(model, trainable, ...)
    return graphdef, trained, frozen
