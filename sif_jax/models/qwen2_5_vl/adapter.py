"""Adapters as PEFT writes them, adapter_config.json and adapter_model.safetensors, in both directions (io)."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from pydantic import BaseModel, Field, PositiveFloat, PositiveInt, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from sif_jax.atomic import new_directory
from sif_jax.errors import InputError
from sif_jax.models.qwen2_5_vl.lora import (
    Adapter,
    Factors,
    attach_lora,
    check_whole_stacks,
    linear_layers,
    lora_of,
    module_names,
    show_modules,
)
from sif_jax.models.qwen2_5_vl.model import Qwen2_5_VL
from sif_jax.models.qwen2_5_vl.names import hub_name, transformers_name
from sif_jax.parallel.placement import gather

Tensors = Mapping[tuple[str, str], np.ndarray]  # by module in transformers, and "A" or "B"
CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
TENSOR = "base_model.model.{module}.lora_{factor}.weight"
# Settings of PEFT that change what is computed, each absent or empty in a plain adapter.
UNSUPPORTED = (
    *("use_dora", "use_qalora", "use_bdlora", "lora_bias", "modules_to_save", "rank_pattern", "alpha_pattern"),
    *("layer_replication", "target_parameters", "trainable_token_indices", "alora_invocation_tokens"),
    *("arrow_config", "kasa_config", "monteclora_config", "velora_config"),
)


class PeftConfig(BaseModel):
    """The part of an adapter_config.json that is computed with."""

    peft_type: Literal["LORA"]
    r: PositiveInt
    lora_alpha: PositiveFloat
    lora_dropout: float = Field(default=0.0, ge=0, lt=1)
    use_rslora: bool = False
    bias: Literal["none"] = "none"
    # The others subtract the first factors from the base weights, which are then no longer this model's.
    init_lora_weights: bool | Literal["gaussian", "orthogonal", "eva"] = True
    base_model_name_or_path: str | None = None

    @property
    def alpha(self) -> float:
        """Such that alpha / r is the scale: rank-stabilised LoRA (arXiv:2312.03732) divides by √r."""
        return self.lora_alpha * self.r**0.5 if self.use_rslora else self.lora_alpha


def save_adapter(model: Qwen2_5_VL, directory: str | Path, *, base: str) -> None:
    """Write the model's adapter so that `peft.PeftModel.from_pretrained` puts it on `base`, a hub name or a path.

    The directory appears whole or not at all.

    Raises:
      InputError: there is no adapter, the directory exists, or the disk is full.
    """
    with new_directory(Path(directory)) as partial:
        write_lora(model, partial, base=base)


def write_lora(model: Qwen2_5_VL, directory: Path, *, base: str) -> None:
    """The files of `save_adapter`, into a directory that is there."""
    adapter = gather_adapter(model)
    if not adapter.factors:
        raise InputError("the model has no adapter to save", fix="train with lora, or export format=merged")
    modules = {name: names for name, names in module_names(model).items() if name in adapter.factors}
    (directory / CONFIG).write_text(json.dumps(_config_json(adapter, modules, base), indent=2) + "\n")
    (directory / WEIGHTS).write_bytes(save(_tensors(adapter, modules), metadata={"format": "pt"}))


def gather_adapter(model: Qwen2_5_VL) -> Adapter:
    """The adapter with its factors on the host; every process of a job calls it, whichever writes."""
    adapter = lora_of(model)
    return dataclasses.replace(adapter, factors=gather(dict(adapter.factors)))


def _config_json(adapter: Adapter, modules: Mapping[str, tuple[str, ...]], base: str) -> dict[str, Any]:
    """Only keys that every version of PEFT since 0.9 knows."""
    return {
        "alpha_pattern": {},
        "auto_mapping": None,
        "base_model_name_or_path": base,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "layers_pattern": None,
        "layers_to_transform": None,
        "lora_alpha": int(adapter.alpha) if adapter.alpha == int(adapter.alpha) else adapter.alpha,
        "lora_dropout": adapter.dropout,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": adapter.rank,
        "rank_pattern": {},
        "revision": None,
        "target_modules": "|".join(_module_regex(names) for names in modules.values()),
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": False,
    }


def _module_regex(names: tuple[str, ...]) -> str:
    escaped = re.escape(names[0])
    return escaped if len(names) == 1 else escaped.replace(r"\.0\.", r"\.\d+\.", 1)


def _tensors(adapter: Adapter, modules: Mapping[str, tuple[str, ...]]) -> dict[str, np.ndarray]:
    """PEFT's [R, d_in] and [d_out, R] of every module."""
    tensors = {}
    for name, factors in adapter.factors.items():
        for factor, value in zip("AB", map(np.asarray, factors)):
            per_layer = value.reshape(-1, *value.shape[-2:])
            for module, matrix in zip(modules[name], per_layer, strict=True):
                tensors[TENSOR.format(module=module, factor=factor)] = np.ascontiguousarray(matrix.T)
    return tensors


def load_adapter(model: Qwen2_5_VL, directory: str | Path, *, source: str | None = None) -> None:
    """Attach an adapter that PEFT or `save_adapter` wrote; rank, alpha and dropout are the file's, factors float32.

    `source` names the model's own checkpoint in errors.

    Raises:
      InputError: a file is missing or damaged, made for another model, or says more than plain LoRA on whole stacks.
    """
    directory = Path(directory)
    config, tensors = _read_config(directory / CONFIG), _read_tensors(directory)
    layers, modules = linear_layers(model), module_names(model)
    adapted = {module for module, _ in tensors}
    _check_modules(directory / WEIGHTS, adapted, modules)
    factors = {}
    for name, names in modules.items():
        if names[0] in adapted:
            *stacked, d_in, d_out = layers[name].kernel.shape
            for module in names:
                _check_factors(directory / WEIGHTS, tensors, module, d_in, d_out, config, source)
            a, b = (np.stack([tensors[module, factor].T for module in names]) for factor in "AB")
            factors[name] = Factors(
                jnp.asarray(a.reshape(*stacked, d_in, config.r), jnp.float32),
                jnp.asarray(b.reshape(*stacked, config.r, d_out), jnp.float32),
            )
    attach_lora(model, Adapter(config.r, config.alpha, config.lora_dropout, factors))


def base_of(directory: str | Path) -> Path:
    """The directory of the checkpoint that an adapter was made for.

    Raises:
      InputError: the adapter does not name one, or it is not here.
    """
    file = Path(directory) / CONFIG
    base = _read_config(file).base_model_name_or_path
    if base is None or not Path(base).is_dir():
        raise InputError(
            "the base of this adapter is not here",
            file=file,
            value=base,
            expected="a directory",
            fix="set model.path to the base and model.adapter to the adapter",
        )
    return Path(base)


def _read_config(file: Path) -> PeftConfig:
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
        config = PeftConfig.model_validate(raw)
    except OSError as error:
        raise InputError(
            f"cannot be read ({error.strerror})", file=file, fix="give the directory of an adapter that PEFT saved"
        ) from None
    except ValidationError as error:
        problem = error.errors()[0]
        key = problem["loc"][0] if problem["loc"] else "the whole file"
        value = None if problem["type"] == "missing" else problem["input"]
        raise InputError(f"wrong value of {key}", file=file, value=value, expected=problem["msg"]) from None
    except ValueError as error:
        raise InputError(f"not JSON: {error}", file=file, fix="copy or download the file again") from None
    for key in UNSUPPORTED:
        if raw.get(key):
            raise InputError(f"{key} is not supported", file=file, value=raw[key], expected="a plain LoRA adapter")
    return config


def _read_tensors(directory: Path) -> Tensors:
    file = directory / WEIGHTS
    if not file.exists() and (directory / PICKLE).exists():
        raise InputError(
            "a pickle is never read", file=directory / PICKLE, expected=WEIGHTS, fix="save it with safe_serialization"
        )
    try:
        with safe_open(file, framework="np") as opened:
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  not a dict
    except (SafetensorError, OSError) as error:
        raise InputError(f"cannot be read: {error}", file=file, fix="copy or download the file again") from None
    return {_factor_of(file, name): value for name, value in tensors.items()}


def _factor_of(file: Path, name: str) -> tuple[str, str]:
    """Module, in the spelling of transformers since 4.52, and factor."""
    match = re.fullmatch(r"base_model\.model\.(.+)\.lora_([AB])\.weight", name)
    if match is None:
        expected = TENSOR.format(module="MODULE", factor="A")
        raise InputError("not a factor of a linear layer", file=file, value=name, expected=f"{expected} or lora_B")
    return transformers_name(hub_name(match[1])), match[2]


def _check_modules(file: Path, adapted: set[str], modules: Mapping[str, tuple[str, ...]]) -> None:
    unknown = sorted(adapted - {module for names in modules.values() for module in names})
    if unknown or not adapted:
        raise InputError(
            "adapts what is no linear layer of this model" if unknown else "holds no adapter",
            file=file,
            value=unknown[0] if unknown else None,
            expected=f"modules among {show_modules(modules)}",
        )
    check_whole_stacks(modules, adapted, file)


def _check_factors(
    file: Path, tensors: Tensors, module: str, d_in: int, d_out: int, config: PeftConfig, source: str | None
) -> None:
    for factor, shape in (("A", (config.r, d_in)), ("B", (d_out, config.r))):
        name = TENSOR.format(module=module, factor=factor)
        if (module, factor) not in tensors:
            raise InputError("a factor is missing", file=file, expected=name)
        value = tensors[module, factor]
        if value.ndim == 2 and value.shape["AB".index(factor)] != config.r:
            raise InputError(
                f"{name} has another rank than {CONFIG}", file=file, value=value.shape, expected=str(shape)
            )
        if value.shape != shape:
            raise InputError(
                f"adapter of another base model than {source or 'this'}: {name}",
                file=file,
                value=value.shape,
                expected=str(shape),
                fix=f"load it on {config.base_model_name_or_path}",
            )
        if not np.isfinite(value.astype(np.float32)).all():
            raise InputError(f"{name} holds NaN or infinity", file=file, fix="use an intact adapter")
