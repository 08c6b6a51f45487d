"""Low-rank adapters (arXiv:2106.09685) with the semantics of PEFT, and the split into trainable and frozen state (pure).

Targets are matched against the module names of transformers, one per layer. A stack of layers is one parameter of ours, so
its layers are adapted together. The patch embedding is a convolution there, and never adapted.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float32, Shaped

from sif_jax.errors import InputError
from sif_jax.models.qwen2_5_vl.layers import Linear, LoRAParam
from sif_jax.models.qwen2_5_vl.model import Qwen2_5_VL
from sif_jax.models.qwen2_5_vl.names import checkpoint_tensors, transformers_name

PATCH_EMBED = ("vision", "patch_embed")


class Factors(NamedTuple):
    """B starts as 0; the layers of a stack lead."""

    a: Float32[Array, "*layers d_in R"]
    b: Float32[Array, "*layers R d_out"]


@dataclass(frozen=True)
class Adapter:
    """Everything that LoRA adds to a model."""

    rank: int
    alpha: float  # an adapter's output is multiplied by alpha / rank
    dropout: float
    factors: Mapping[str, Factors]  # by the name of the linear layer, such as "decoder.layers.q_proj"


def linear_layers(model: Qwen2_5_VL) -> dict[str, Linear]:
    """The layers that can be adapted, by dotted name; the layers of a stack count once."""
    return {
        ".".join(map(str, path)): module
        for path, module in nnx.iter_modules(model)
        if isinstance(module, Linear) and path != PATCH_EMBED
    }


def module_names(model: Qwen2_5_VL) -> dict[str, tuple[str, ...]]:
    """For each linear layer, its modules in transformers: one, or one per layer of a stack."""
    kernels = nnx.state(model, lambda path, _: path[-1] == "kernel" and path[:-1] != PATCH_EMBED)
    return {
        ".".join(map(str, path[:-1])): tuple(transformers_name(name.removesuffix(".weight")) for name in tensor.names)
        for path, tensor in checkpoint_tensors(model.config, kernels).items()
    }


def add_lora(
    model: Qwen2_5_VL,
    *,
    rank: int,
    alpha: float,
    dropout: float,
    targets: str | Sequence[str],
    freeze_vision: bool,
    rngs: nnx.Rngs,
) -> None:
    """Give the target layers factors A ~ U(-1/√d_in, 1/√d_in) and B = 0, as PEFT does, in float32.

    `targets` is "all-linear" (every linear layer but the head), "language" (the decoder's), a regular expression that
    matches whole module names such as "model.language_model.layers.3.self_attn.q_proj", or a list of names or their ends.

    Raises:
      InputError: a target matches nothing, or only some layers of a stack, or only what is frozen.
    """
    layers = linear_layers(model)
    chosen = _chosen(module_names(model), targets, freeze_vision=freeze_vision)
    factors = {name: _initial_factors(layers[name], rank, rngs.params()) for name in layers if name in chosen}
    attach_lora(model, Adapter(rank, alpha, dropout, factors))


def _initial_factors(layer: Linear, rank: int, key: Array) -> Factors:
    *stacked, d_in, d_out = layer.kernel.shape
    bound = d_in**-0.5
    a = jax.random.uniform(key, (*stacked, d_in, rank), jnp.float32, -bound, bound)
    return Factors(a, jnp.zeros((*stacked, rank, d_out), jnp.float32))


def _chosen(modules: Mapping[str, Sequence[str]], targets: str | Sequence[str], *, freeze_vision: bool) -> set[str]:
    listed = not isinstance(targets, str)
    matched: set[str] = set()
    for target in targets if listed else [targets]:
        found = {module for names in modules.values() for module in names if _matches(module, target, listed=listed)}
        if not found:
            raise InputError(
                "no layer to adapt",
                value=target,
                expected=f"a match for one of {show_modules(modules)}",
                fix="lora.targets",
            )
        matched |= found
    if freeze_vision:
        matched = {module for module in matched if not module.startswith("model.visual.")}
    if not matched:
        raise InputError(
            "only frozen layers to adapt", value=targets, fix="set freeze_vision=false, or other lora.targets"
        )
    check_whole_stacks(modules, matched)
    return {name for name, names in modules.items() if names[0] in matched}


def _matches(module: str, target: str, *, listed: bool) -> bool:
    if listed:
        return module == target or module.endswith(f".{target}")
    if target == "all-linear":
        return True
    if target == "language":
        return module.startswith("model.language_model.")
    return re.fullmatch(target, module) is not None


def check_whole_stacks(modules: Mapping[str, Sequence[str]], adapted: set[str], file: Any = None) -> None:
    """
    Raises:
      InputError: some layers of a stack are adapted, but not all.
    """
    for names in modules.values():
        layers = [layer for layer, module in enumerate(names) if module in adapted]
        if 0 < len(layers) < len(names):
            raise InputError(
                f"{_pattern(names)} is adapted in some layers only",
                file=file,
                value=layers,
                expected=f"all {len(names)} layers, which share one parameter",
            )


def _pattern(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else names[0].replace(".0.", ".*.", 1)


def show_modules(modules: Mapping[str, Sequence[str]]) -> str:
    return ", ".join(map(_pattern, modules.values()))


def lora_of(model: Qwen2_5_VL) -> Adapter:
    """The adapter that a model carries; without one, rank 0 and no factors."""
    factors, settings = {}, (0, 0.0, 0.0)
    for name, layer in linear_layers(model).items():
        if layer.lora_a is not None and layer.lora_b is not None:
            factors[name] = Factors(layer.lora_a[...], layer.lora_b[...])
            settings = (layer.lora_a.shape[-1], layer.lora_alpha, layer.lora_dropout)
    return Adapter(*settings, factors)


def attach_lora(model: Qwen2_5_VL, adapter: Adapter) -> None:
    """
    Raises:
      InputError: the model carries an adapter already.
    """
    if lora_of(model).factors:
        raise InputError("this model has an adapter already", fix="merge that one first")
    layers = linear_layers(model)
    for name, factors in adapter.factors.items():
        layer = layers[name]
        layer.lora_a, layer.lora_b = nnx.data(LoRAParam(factors.a)), nnx.data(LoRAParam(factors.b))
        layer.lora_alpha, layer.lora_dropout = adapter.alpha, adapter.dropout


def merge_lora(model: Qwen2_5_VL) -> Adapter:
    """Fold the adapter into the weights, W + (alpha / R) A B, and take it off; returns it, for `unmerge_lora`.

    Weights change in place: states that were split from this model before no longer hold them.
    """
    adapter, layers = lora_of(model), linear_layers(model)
    for name, factors in adapter.factors.items():
        layer = layers[name]
        layer.kernel.set_value(add_product(layer.kernel[...], *factors, adapter.alpha / adapter.rank))
        layer.lora_a = layer.lora_b = nnx.data(None)
    return adapter


def unmerge_lora(model: Qwen2_5_VL, adapter: Adapter) -> None:
    """Undo `merge_lora`: each weight is what it was, up to one rounding in its dtype, and the adapter is attached again.

    Weights change in place: states that were split from this model before no longer hold them.
    """
    attach_lora(model, adapter)
    layers = linear_layers(model)
    for name, factors in adapter.factors.items():
        kernel = layers[name].kernel
        kernel.set_value(add_product(kernel[...], *factors, -adapter.alpha / adapter.rank))


@jax.jit(donate_argnums=0)
def add_product(
    kernel: Shaped[Array, "*layers d_in d_out"],
    a: Float32[Array, "*layers d_in R"],
    b: Float32[Array, "*layers R d_out"],
    scale: Float32[Array, ""],
) -> Shaped[Array, "*layers d_in d_out"]:
    """W + scale A B, summed in float32; a stack layer by layer, so that only one layer is ever wide."""

    def added(kernel: Array, a: Array, b: Array) -> Array:
        return (kernel.astype(jnp.float32) + scale * jnp.matmul(a, b, precision="highest")).astype(kernel.dtype)

    if kernel.ndim == 2:
        return added(kernel, a, b)
    return jax.lax.fori_loop(0, len(kernel), lambda i, stack: stack.at[i].set(added(stack[i], a[i], b[i])), kernel)


def split_trainable(model: Qwen2_5_VL, *, lora: bool, freeze_vision: bool) -> tuple[nnx.GraphDef, nnx.State, nnx.State]:
    """(graphdef, trainable, frozen): the adapters, or without LoRA every weight, minus the vision tower if it is frozen."""

    def trainable(path: Any, value: Any) -> bool:
        is_adapter = isinstance(value, LoRAParam) or getattr(value, "type", None) is LoRAParam
        return is_adapter == lora and not (freeze_vision and path[0] == "vision")

    graphdef, trained, frozen = nnx.split(model, trainable, ...)
    return graphdef, trained, frozen
