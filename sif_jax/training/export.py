"""Write what was trained as files that others read: a Hugging Face model, or a PEFT adapter (io)."""

from __future__ import annotations

from pathlib import Path

import yaml

from sif_jax.atomic import new_directory
from sif_jax.config import ExportConfig, GrpoConfig, ModelConfig, SftConfig, TrainConfig, load_config
from sif_jax.errors import InputError
from sif_jax.models.qwen2_5_vl.adapter import save_adapter
from sif_jax.models.qwen2_5_vl.checkpoint import find_checkpoint, open_model, open_processor
from sif_jax.models.qwen2_5_vl.config import stored_dtype
from sif_jax.models.qwen2_5_vl.image_processor import recorded_pixels
from sif_jax.models.qwen2_5_vl.lora import merge_lora
from sif_jax.models.qwen2_5_vl.weights import write_model
from sif_jax.training.checkpoint import Checkpoints
from sif_jax.training.policy_files import open_policy, whole_model, write_adapter, write_merged


def export(config: ExportConfig) -> Path:
    """Write `config.out` and return it.

    Raises:
      InputError: there is nothing to export, `out` exists, or the disk is full; nothing half-written is left.
    """
    out = Path(config.out)
    if out.exists():
        raise InputError("already exists", file=out, fix="choose another directory or remove this one")
    if (Path(config.path) / "config.yaml").is_file():
        _export_run(config, out)
    else:
        _export_files(config, out)
    return out


def _export_run(config: ExportConfig, out: Path) -> None:
    """From the run's checkpoint, so that any saved step can be had, and in another dtype than it ended in."""
    run = Path(config.path)
    if config.adapter:
        raise InputError("a run has its own adapter", value=f"adapter={config.adapter}", fix="leave adapter out")
    trained = _run_config(run)
    if config.dtype:
        trained = trained.model_copy(update={"model": trained.model.model_copy(update={"dtype": config.dtype})})
    policy = open_policy(trained.model, lora=trained.lora, freeze_vision=trained.freeze_vision, seed=trained.run.seed)
    checkpoints = Checkpoints(run / "checkpoints", trained.run.keep)
    like = {"state": {"trainable": policy.trainable}}
    _, saved, _ = checkpoints.restore(config.step, like, partial=True)
    checkpoints.close()
    model = whole_model(policy, saved["state"]["trainable"])
    (write_merged if config.format == "merged" else write_adapter)(policy, model, out)


def _run_config(run: Path) -> TrainConfig:
    keys = yaml.safe_load((run / "config.yaml").read_text())
    kind = next((kind for key, kind in {"target": SftConfig, "objective": GrpoConfig}.items() if key in keys), None)
    if kind is None:
        raise InputError("not a training run", file=run / "config.yaml", expected="a run of sif-jax sft or grpo")
    return load_config(kind, run / "config.yaml")


def _export_files(config: ExportConfig, out: Path) -> None:
    if config.step:
        raise InputError("not a run", file=config.path, value=f"step={config.step}", fix="leave step out")
    source = ModelConfig(path=config.path, adapter=config.adapter)
    base, adapter = find_checkpoint(source)
    model = open_model(source.model_copy(update={"dtype": config.dtype or stored_dtype(base)}))
    if config.format == "adapter":
        save_adapter(model, out, base=str(base))
        return
    merge_lora(model)
    with new_directory(out) as partial:
        write_model(model, partial, source=base)
        if adapter and recorded_pixels(adapter):
            open_processor(source).image_processor.save(partial, trained=True)
