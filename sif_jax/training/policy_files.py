"""Open the model a run trains, and write it back as a Hugging Face directory (io)."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import jax
from flax import nnx

from sif_jax.config import LoraConfig, ModelConfig
from sif_jax.errors import InputError
from sif_jax.models.qwen2_5_vl.chat import ChatProcessor
from sif_jax.models.qwen2_5_vl.checkpoint import model_directory, open_model, open_processor
from sif_jax.models.qwen2_5_vl.config import Qwen2_5_VLConfig
from sif_jax.models.qwen2_5_vl.lora import add_lora, merge_lora, split_trainable
from sif_jax.models.qwen2_5_vl.weights import save_model


@dataclasses.dataclass(frozen=True)
class Policy:
    """A model as static structure, trainable state and frozen state, with the processor of its inputs."""

    processor: ChatProcessor
    config: Qwen2_5_VLConfig
    graphdef: nnx.GraphDef
    trainable: nnx.State
    frozen: nnx.State
    source: Path


def open_policy(config: ModelConfig, *, lora: LoraConfig | None, freeze_vision: bool, seed: int) -> Policy:
    """Load the checkpoint, attach adapters, and split what is trained from what is not."""
    model = open_model(config)
    if lora:
        add_lora(model, **lora.model_dump(), freeze_vision=freeze_vision, rngs=nnx.Rngs(params=seed))
    graphdef, trainable, frozen = split_trainable(model, lora=lora is not None, freeze_vision=freeze_vision)
    source = model_directory(config.path)
    return Policy(open_processor(config), model.config, graphdef, trainable, frozen, source)


def export_policy(policy: Policy, trainable: Any, directory: Path) -> None:
    """Write the trained model, adapters merged, with the run's pixel limits; an earlier export stays until it is done."""
    model = nnx.merge(policy.graphdef, *jax.tree.map(lambda x: x, (trainable, policy.frozen)))
    merge_lora(model)
    new = directory.with_name(directory.name + ".new")
    shutil.rmtree(new, ignore_errors=True)
    save_model(model, new, source=policy.source)
    policy.processor.image_processor.save(new)
    shutil.rmtree(directory, ignore_errors=True)
    new.rename(directory)


def check_finite(loss: float, *, step: int, file: Path) -> None:
    """Stop on NaN or infinity, which no later step can mend."""
    if not abs(loss) < float("inf"):
        raise InputError(
            f"the loss of step {step} is {loss}",
            file=file,
            expected="a finite number",
            fix="lower optimizer.learning_rate; the last checkpoint is intact",
        )
