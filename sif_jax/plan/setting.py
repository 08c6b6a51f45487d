"""What a plan is made for: a config, a model known by its numbers, and devices (host)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import yaml

from sif_jax.config import GrpoConfig, SftConfig, TrainConfig, load_config
from sif_jax.config.mesh import AXES
from sif_jax.errors import InputError
from sif_jax.models.qwen2_5_vl.config import Qwen2_5_VLConfig
from sif_jax.parallel.mesh import mesh_shape
from sif_jax.plan.topology import Topology

MODELS = ("3B", "7B", "32B", "72B")
ARCHITECTURES = Path(__file__).resolve().parents[2] / "configs" / "models"


class Setting(NamedTuple):
    config: TrainConfig
    architecture: Qwen2_5_VLConfig
    model: str
    topology: Topology

    @property
    def mesh(self) -> dict[str, int]:
        """
        Raises:
          InputError: the axes do not multiply to the devices.
        """
        return dict(zip(AXES, mesh_shape(self.config.mesh, self.topology.num_devices), strict=True))

    @property
    def kind(self) -> str:
        return "sft" if isinstance(self.config, SftConfig) else "grpo"


def read_config(words: Sequence[str]) -> TrainConfig:
    """SFT's or GRPO's, as its keys tell; what a plan does not read may be missing.

    Raises:
      InputError: the keys are of neither, or of both.
    """
    paths = [word for word in words if "=" not in word]
    if len(paths) > 1:
        raise InputError("more than one config", file="command line", value=paths, expected="one CONFIG.yaml")
    path, overrides = paths[0] if paths else None, [word for word in words if "=" in word]
    return load_config(_kind(path, overrides), path, overrides)


def _kind(path: str | None, overrides: Sequence[str]) -> type[SftConfig] | type[GrpoConfig]:
    keys = {word.partition("=")[0].partition(".")[0] for word in overrides} | _top_keys(path)
    only_grpo = keys & (set(GrpoConfig.model_fields) - set(SftConfig.model_fields))
    only_sft = keys & (set(SftConfig.model_fields) - set(GrpoConfig.model_fields))
    if bool(only_grpo) == bool(only_sft):
        found = f"{sorted(only_sft)} and {sorted(only_grpo)}" if only_grpo else sorted(keys)
        expected = "keys of SFT, such as batch_size, or of GRPO, such as num_samples"
        raise InputError("neither an SFT nor a GRPO config", file=path, value=found, expected=expected)
    return GrpoConfig if only_grpo else SftConfig


def _top_keys(path: str | None) -> set[str]:
    """What is unreadable here is told by `load_config`."""
    if path is None or not Path(path).is_file():
        return set(SftConfig.model_fields) - set(GrpoConfig.model_fields) if path else set()
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError):
        return {"batch_size"}
    return set(values) if isinstance(values, dict) else {"batch_size"}


def read_architecture(model: str | None, config: TrainConfig) -> tuple[str, Qwen2_5_VLConfig]:
    """By a size (3B, 7B, 32B, 72B), a directory with a config.json, or the config's own `model.path`.

    Raises:
      InputError: no such model is here.
    """
    name = model or config.model.path
    if name in MODELS:
        return name, Qwen2_5_VLConfig.from_directory(ARCHITECTURES / f"Qwen2.5-VL-{name}-Instruct")
    for directory in (Path(name), Path(name) / "model", ARCHITECTURES / Path(name).name):
        if (directory / "config.json").is_file():
            return _short(name), Qwen2_5_VLConfig.from_directory(directory)
    expected = f"{', '.join(MODELS)}, or a directory with a config.json"
    fix = "give --model" if model is None else "check --model"
    raise InputError("no model here", file=name, expected=expected, fix=fix)


def _short(name: str) -> str:
    return next((size for size in MODELS if Path(name).name == f"Qwen2.5-VL-{size}-Instruct"), name)
