"""A tiny random model, a dozen scenes and the configs of runs on them, that every test of a whole run shares."""

import json
import os
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import TypeVar

import numpy as np
from safetensors.numpy import load_file

from sif_jax.config import DemoConfig, EvalConfig, GrpoConfig, SftConfig, load_config
from sif_jax.demo import _build_scenes, _write_model
from sif_jax.training.metrics import read_metrics
from tests.conftest import ROOT

Kind = TypeVar("Kind", SftConfig, GrpoConfig, EvalConfig)
FILES = {SftConfig: "sft", GrpoConfig: "grpo", EvalConfig: "eval"}
MAX_PIXELS = 84 * 56
PATCHES = 2 * MAX_PIXELS // 14**2
DEMO = [
    "scenes={sft: 6, grpo: 6, test: 4, questions_per_scene: 2, sizes_px: [[168, 112], [112, 168]], max_areas: 2, workers: 1}",
    f"tiny_model={{vocab_size: 512, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 2, max_pixels: {MAX_PIXELS}}}",
    "tiny_model.vision={depth: 2, hidden_size: 16, intermediate_size: 32, num_heads: 2, window_size: 56}",
]
SMALL = [f"model.max_pixels={MAX_PIXELS}", f"data.buckets.patches=[{PATCHES}]"]
STEADY = ["epochs=100", "optimizer.warmup_ratio=0", "optimizer.schedule=constant", "run.tensorboard=false"]
STAGE = {
    SftConfig: [*STEADY, "data.buckets.tokens=[160]", "batch_size=4"],
    GrpoConfig: [
        *STEADY,
        "data.buckets.tokens=[56]",
        "prompts_per_step=4",
        "micro_batch=4",
        "num_samples=3",
        "max_new_tokens=8",
    ],
    EvalConfig: ["data.buckets.tokens=[56]", "batch_size=8", "max_new_tokens=8"],
}


@cache
def tiny_files() -> Path:
    """A folder with `model` and `scenes/{sft,grpo,test}.json`; not to be changed. A process that a test starts is told of it."""
    if "TINY_FILES" in os.environ:
        return Path(os.environ["TINY_FILES"])
    root = Path(mkdtemp(prefix="sif-jax-run-"))
    config = load_config(DemoConfig, None, DEMO)
    scenes = _build_scenes(config, root / "scenes")
    _write_model(config, scenes["sft"], root / "model")
    return root


def write_tiny_model(directory: Path, *overrides: str) -> Path:
    """Another tiny model, for the same scenes."""
    _write_model(load_config(DemoConfig, None, [*DEMO, *overrides]), tiny_files() / "scenes/sft.json", directory)
    return directory


def tiny_config(kind: type[Kind], root: Path, *overrides: str) -> Kind:
    """The demo's config of a stage, on the tiny model and scenes; the run is `root / "run"`."""
    files, split = tiny_files(), {SftConfig: "sft", GrpoConfig: "grpo", EvalConfig: "test"}[kind]
    ours = [
        f"run.root={root}",
        "run.name=run",
        f"model.path={files / 'model'}",
        f"data.path={files}/scenes/{split}.json",
    ]
    return load_config(kind, ROOT / f"configs/demo/{FILES[kind]}.yaml", [*ours, *SMALL, *STAGE[kind], *overrides])


def weights(run: Path) -> dict[str, np.ndarray]:
    return load_file(run / "model.safetensors" if run.name == "model" else run / "model" / "model.safetensors")


def assert_same_weights(one: Path, other: Path) -> None:
    first, second = weights(one), weights(other)
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert value.tobytes() == second[name].tobytes(), name


def changed_weights(run: Path) -> set[str]:
    """Names of the exported tensors that differ from the model that the run started from."""
    before, after = weights(tiny_files() / "model"), weights(run)
    assert before.keys() == after.keys()
    return {name for name, value in before.items() if value.tobytes() != after[name].tobytes()}


def measured(run: Path) -> list[dict]:
    """The metrics, without what a clock says."""
    return [
        {key: value for key, value in row.items() if key != "time" and "second" not in key} for row in read_metrics(run)
    ]


def records_of(split: str) -> list[dict]:
    return json.loads((tiny_files() / "scenes" / f"{split}.json").read_text())


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.write_text(json.dumps(rows))
    return path
