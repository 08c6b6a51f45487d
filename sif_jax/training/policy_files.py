"""Open the model a run trains, and write it back as files that others read (io)."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from flax import nnx
from jax.sharding import Mesh

from sif_jax.atomic import new_directory
from sif_jax.config import LoraConfig, ModelConfig
from sif_jax.errors import InputError
from sif_jax.models.qwen2_5_vl.adapter import gather_adapter, write_lora
from sif_jax.models.qwen2_5_vl.axes import place_parameters
from sif_jax.models.qwen2_5_vl.chat import ChatProcessor
from sif_jax.models.qwen2_5_vl.checkpoint import Checkpoint, find_checkpoint, open_model, open_processor
from sif_jax.models.qwen2_5_vl.config import Qwen2_5_VLConfig
from sif_jax.models.qwen2_5_vl.layer_arrays import AnyState, put_together, take_apart
from sif_jax.models.qwen2_5_vl.lora import add_lora, lora_of, merge_lora, split_trainable
from sif_jax.models.qwen2_5_vl.model import Qwen2_5_VL
from sif_jax.models.qwen2_5_vl.weights import gather_weights, write_model
from sif_jax.parallel.distributed import is_first, raise_together
from sif_jax.parallel.mesh import data_mesh


@dataclasses.dataclass(frozen=True)
class Policy:
    """A model as static structure, trainable state and frozen state, with the processor of its inputs."""

    processor: ChatProcessor
    config: Qwen2_5_VLConfig
    graphdef: nnx.GraphDef
    trainable: nnx.State
    frozen: AnyState  # its decoder's layers apart where the model writes them out
    source: Checkpoint


def open_policy(
    config: ModelConfig, *, lora: LoraConfig | None, freeze_vision: bool, seed: int, mesh: Mesh | None = None
) -> Policy:
    """Load the checkpoint, fold in the adapter it comes with, attach a new one, and split what is trained from what is not."""
    mesh = mesh or data_mesh()
    model = open_model(config, mesh)
    place_parameters(model, mesh)
    merge_lora(model)
    if lora:
        add_lora(model, **lora.model_dump(), freeze_vision=freeze_vision, rngs=nnx.Rngs(params=seed))
        place_parameters(model, mesh)
    graphdef, trainable, frozen = split_trainable(model, lora=lora is not None, freeze_vision=freeze_vision)
    held = frozen if config.scan_layers else take_apart(frozen)
    return Policy(open_processor(config), model.config, graphdef, trainable, held, find_checkpoint(config))


def whole_model(policy: Policy, trainable: nnx.State) -> Qwen2_5_VL:
    """With these weights; those of `policy.frozen` are used up."""
    return nnx.merge(policy.graphdef, trainable, put_together(policy.frozen), copy=True)


def export_policy(policy: Policy, trainable: nnx.State, run: Path) -> None:
    """Write `run/model`, adapters merged, and `run/adapter` where there is one; earlier exports stay until then.

    The first process writes, tensor by tensor; the others give it their parts. The weights of `policy.frozen` are used up.

    Raises:
      InputError: on every process, where the first cannot write.
    """
    model = whole_model(policy, trainable)
    problem = None
    try:
        if lora_of(model).factors and not policy.source.adapter:
            write_adapter(policy, model, run / "adapter", replace=True)
        write_merged(policy, model, run / "model", replace=True)
    except InputError as error:
        problem = error
    raise_together(problem)


def write_merged(policy: Policy, model: Qwen2_5_VL, directory: Path, *, replace: bool = False) -> None:
    """A Hugging Face directory with adapters folded in, which records the pixel limits of the run."""
    merge_lora(model)
    if not is_first():
        gather_weights(model)
        return
    with new_directory(directory, replace=replace) as partial:
        write_model(model, partial, source=policy.source.base)
        policy.processor.image_processor.save(partial, trained=True)


def write_adapter(policy: Policy, model: Qwen2_5_VL, directory: Path, *, replace: bool = False) -> None:
    """A PEFT directory, which records the pixel limits of the run.

    Raises:
      InputError: the run had no adapter, or folded another one into its base, which is then no checkpoint on disk.
    """
    base, folded = policy.source
    if folded:
        raise InputError(
            "the base of this adapter is nowhere on disk",
            file=base,
            value=f"model.adapter={folded}",
            fix="export format=merged; or export the first adapter merged, and train on that",
        )
    if not is_first():
        gather_adapter(model)
        return
    with new_directory(directory, replace=replace) as partial:
        write_lora(model, partial, base=str(base))
        policy.processor.image_processor.save(partial, trained=True)
