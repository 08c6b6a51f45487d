"""The whole path on a tiny random model: scenes, SFT, GRPO-SIF, evaluation, table and report (io).

Every step is the one that `sif-jax data build`, `sft`, `grpo` and `eval` run; only the sizes are small.
"""

from __future__ import annotations

import json
import platform
import re
import time
from collections.abc import Callable, Mapping
from datetime import date
from pathlib import Path
from typing import TypeVar

import jax
import numpy as np
from safetensors import safe_open

from sif_jax.config import DemoConfig, EvalConfig, GrpoConfig, SftConfig, load_config
from sif_jax.data.photographs.build import build_photographs
from sif_jax.data.scenes.build import build_scenes
from sif_jax.data.scenes.config import ScenesConfig
from sif_jax.evals.evaluate import evaluate
from sif_jax.evals.statistics import Summary
from sif_jax.evals.table import markdown_table, text_table
from sif_jax.models.qwen2_5_vl.tiny import write_tiny_checkpoint
from sif_jax.models.qwen2_5_vl.tiny_tokenizer import train_tokenizer
from sif_jax.report.page import write_report
from sif_jax.report.stages import Stage
from sif_jax.sif.prompts import IMAGE, ovd_question, rec_question, user_text
from sif_jax.sif.record import read_records
from sif_jax.training import grpo, sft

Result = TypeVar("Result")
Kind = TypeVar("Kind", SftConfig, GrpoConfig, EvalConfig)
STAGES = {"untrained": "model", "SFT": "sft", "SFT + GRPO-SIF": "grpo"}  # name → directory of its model
PHOTOGRAPHS = {"Photographs with measured depth": True, "Photographs without depth": False}


class Clock:
    """How long each part took, in seconds."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def time(self, part: str, work: Callable[[], Result]) -> Result:
        print(f"== {part}", flush=True)
        began = time.monotonic()
        result = work()
        self.seconds[part] = self.seconds.get(part, 0.0) + time.monotonic() - began
        return result


def run(config: DemoConfig) -> Path:
    """Build, train, evaluate; print the table and return the path of the report. Finished parts are not trained again."""
    root, clock = Path(config.root), Clock()
    scenes = clock.time("scenes", lambda: _build_scenes(config, root / "scenes"))
    photographs = build_photographs(root / "photographs")
    clock.time("tiny random Qwen2.5-VL", lambda: _write_model(config, scenes["sft"], root / "model"))

    samples = {"untrained": clock.time("eval untrained", lambda: _evaluate(config, "untrained", scenes["test"]))}
    clock.time("SFT", lambda: sft.train(_load(SftConfig, config.sft, root, "model", scenes["sft"], "sft")))
    samples["SFT"] = clock.time("eval SFT", lambda: _evaluate(config, "SFT", scenes["test"]))
    clock.time("GRPO-SIF", lambda: grpo.train(_load(GrpoConfig, config.grpo, root, "sft", scenes["grpo"], "grpo")))
    samples["SFT + GRPO-SIF"] = clock.time(
        "eval SFT + GRPO-SIF", lambda: _evaluate(config, "SFT + GRPO-SIF", scenes["test"])
    )
    extra = clock.time("photographs", lambda: _evaluate_photographs(config, photographs))

    summaries = {name: _summary(directory) for name, directory in samples.items()}
    report = root / "report.html"
    write_report(
        report,
        title="SIFThinker in JAX: the demo",
        facts=_facts(config, clock.seconds, root / "model"),
        stages=[_stage(name, root, samples[name]) for name in STAGES],
        extra_samples={heading: {"SFT + GRPO-SIF": path / "samples.jsonl"} for heading, path in extra.items()},
    )
    (root / "table.md").write_text(markdown_table(summaries))
    print(text_table(summaries))
    print("  ".join(f"{part} {seconds:.0f} s" for part, seconds in clock.seconds.items()))
    return report


def _build_scenes(config: DemoConfig, directory: Path) -> Mapping[str, Path]:
    scenes = ScenesConfig(**config.scenes.model_dump(include={"questions_per_scene", "sizes_px", "max_areas"}))
    splits = {"sft": config.scenes.sft, "grpo": config.scenes.grpo, "test": config.scenes.test}
    return build_scenes(directory, scenes, splits, config.seed, config.scenes.workers)


def _write_model(config: DemoConfig, records: Path, directory: Path) -> None:
    corpus = [_chat_text(user_text(r.problem), r.completion or "") for r in read_records(records).records]
    tokenizer = train_tokenizer(corpus, phrases=_fixed_phrases(), vocab_size=config.tiny_model.vocab_size)
    write_tiny_checkpoint(directory, config.tiny_model, tokenizer, seed=config.seed)


def _chat_text(user: str, assistant: str) -> str:
    """What the model reads and writes, so that the tokenizer's merges fit it."""
    shown = user.replace(IMAGE, "<|vision_start|><|image_pad|><|vision_end|>")
    turns = {"system": "You are a helpful assistant.", "user": shown, "assistant": assistant}
    return "\n".join(f"<|im_start|>{role}\n{text}<|im_end|>" for role, text in turns.items())


def _fixed_phrases() -> list[str]:
    """The words that stand around every question."""
    gap = "\0"
    texts = [_chat_text(user_text(gap), gap), rec_question(gap), ovd_question([gap])]
    pieces = {piece for text in texts for piece in re.split(r"<\|.*?\|>|\0", text)}
    return sorted(piece for piece in pieces if len(piece) > 2)


def _load(kind: type[Kind], path: str, root: Path, model: str, data: Path, name: str, *overrides: str) -> Kind:
    """A stage's config, with the demo's own directories."""
    ours = [f"run.root={root}", f"run.name={name}", f"model.path={root / model}", f"data.path={data}"]
    return load_config(kind, path, [*ours, *overrides])


def _evaluate(config: DemoConfig, stage: str, data: Path, *overrides: str, name: str | None = None) -> Path:
    root, model = Path(config.root), STAGES[stage]
    return evaluate(_load(EvalConfig, config.eval, root, model, data, f"eval-{name or model}", *overrides))


def _evaluate_photographs(config: DemoConfig, records: Path) -> dict[str, Path]:
    """The trained model on real pictures: those with measured depth, and all of them without."""
    return {
        heading: _evaluate(
            config,
            "SFT + GRPO-SIF",
            records,
            f"prompt.depth_input={str(with_depth).lower()}",
            "data.on_error=skip",
            name=heading.lower().replace(" ", "-"),
        )
        for heading, with_depth in PHOTOGRAPHS.items()
    }


def _stage(name: str, root: Path, evaluation: Path) -> Stage:
    metrics = root / STAGES[name] / "metrics.jsonl"
    return Stage(name, metrics if metrics.exists() else None, evaluation / "samples.jsonl")


def _summary(directory: Path) -> Summary:
    return Summary.from_json(json.loads((directory / "summary.json").read_text()))


def _facts(config: DemoConfig, seconds: Mapping[str, float], model: Path) -> dict[str, str]:
    with safe_open(model / "model.safetensors", framework="np") as file:
        parameters = sum(int(np.prod(file.get_slice(name).get_shape())) for name in file.keys())  # noqa: SIM118
    devices = ", ".join(sorted({device.device_kind for device in jax.devices()}))
    return {
        "date": date.today().isoformat(),
        "machine": f"{platform.machine()}, {jax.device_count()} x {devices}, jax {jax.__version__}",
        "seed": str(config.seed),
        "model": f"{parameters / 1e6:.2f} M parameters, random at the start",
        "scenes": f"{config.scenes.sft} for SFT, {config.scenes.grpo} for GRPO-SIF, {config.scenes.test} held out",
        "wall time": ", ".join(f"{part} {second:.0f} s" for part, second in seconds.items()),
    }
