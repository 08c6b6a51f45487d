"""Open a checkpoint by its config section: the processor and the model (io)."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from jax.sharding import Mesh

from sif_jax.config import ModelConfig
from sif_jax.errors import InputError
from sif_jax.models.qwen2_5_vl.adapter import CONFIG as ADAPTER_CONFIG
from sif_jax.models.qwen2_5_vl.adapter import base_of, load_adapter
from sif_jax.models.qwen2_5_vl.chat import ChatProcessor
from sif_jax.models.qwen2_5_vl.image_processor import recorded_pixels
from sif_jax.models.qwen2_5_vl.model import Qwen2_5_VL
from sif_jax.models.qwen2_5_vl.weights import load_model
from sif_jax.ops.attention_choice import choose_backend


class Checkpoint(NamedTuple):
    base: Path  # a Hugging Face directory
    adapter: Path | None  # a PEFT directory


def find_checkpoint(config: ModelConfig) -> Checkpoint:
    """What `model.path` and `model.adapter` name: a run of ours stands for what it exported, an adapter for its base too.

    Raises:
      InputError: an adapter whose base is not here, or two adapters.
    """
    path, adapter = Path(config.path), Path(config.adapter) if config.adapter else None
    if adapter and (adapter / "adapter" / ADAPTER_CONFIG).is_file():
        adapter = adapter / "adapter"
    if (path / "model" / "config.json").is_file():
        return Checkpoint(path / "model", adapter)
    if (path / "config.json").is_file() or not (path / ADAPTER_CONFIG).is_file():
        return Checkpoint(path, adapter)
    if adapter:
        raise InputError("two adapters", value=f"{path} and {adapter}", expected="one", fix="set path to their base")
    return Checkpoint(find_checkpoint(ModelConfig(path=str(base_of(path)))).base, path)


def open_processor(config: ModelConfig) -> ChatProcessor:
    """The processor of a checkpoint, with the pixel limits it was trained with, or those of the config.

    Raises:
      InputError: the config's limits are not the recorded ones, and `other_pixels` does not allow it.
    """
    base, adapter = find_checkpoint(config)
    limits = {"min_pixels": config.min_pixels, "max_pixels": config.max_pixels}
    given = {name: value for name, value in limits.items() if value is not None}
    recorded = recorded_pixels(adapter or base) or {}
    for name, value in given.items():
        if recorded and value != recorded[name] and not config.other_pixels:
            raise InputError(
                f"trained with another {name}",
                file=adapter or base,
                value=value,
                expected=str(recorded[name]),
                fix=f"leave model.{name} out, or set model.other_pixels=true",
            )
    return ChatProcessor.from_directory(base, **(recorded | given))


def open_model(config: ModelConfig, mesh: Mesh | None = None) -> Qwen2_5_VL:
    """The model of a checkpoint, its adapter beside the weights."""
    base, adapter = find_checkpoint(config)
    attention = choose_backend(config.attention, config.dtype)
    model = load_model(
        base,
        dtype=config.dtype,
        remat=config.remat,
        attention=attention,
        scan_layers=config.scan_layers,
        mesh=mesh,
    )
    if adapter:
        load_adapter(model, adapter, source=str(base))
    return model
