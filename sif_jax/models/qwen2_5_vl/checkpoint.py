"""Open a checkpoint by its config section: the processor and the model (io)."""

from __future__ import annotations

from pathlib import Path

from sif_jax.config import ModelConfig
from sif_jax.models.qwen2_5_vl.chat import ChatProcessor
from sif_jax.models.qwen2_5_vl.model import Qwen2_5_VL
from sif_jax.models.qwen2_5_vl.weights import load_model
from sif_jax.ops.attention_choice import choose_backend


def model_directory(path: str | Path) -> Path:
    """The Hugging Face directory of `path`: itself, or the exported model of one of our runs."""
    path = Path(path)
    return path / "model" if (path / "model" / "config.json").is_file() else path


def open_processor(config: ModelConfig) -> ChatProcessor:
    limits = {"min_pixels": config.min_pixels, "max_pixels": config.max_pixels}
    given = {name: value for name, value in limits.items() if value is not None}
    return ChatProcessor.from_directory(model_directory(config.path), **given)


def open_model(config: ModelConfig) -> Qwen2_5_VL:
    attention = choose_backend(config.attention, config.dtype)
    return load_model(model_directory(config.path), dtype=config.dtype, remat=config.remat, attention=attention)
