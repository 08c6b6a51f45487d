"""A grid of variants: each is fine-tuned, reinforced and evaluated on the same records, and one table compares them (io).

Trainings that would be the same are run once, under the name of the first variant that asks for them. What is finished is
not run again. Differences from the first variant are taken question by question, which narrows their intervals.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from sif_jax.atomic import write_text
from sif_jax.config import (
    AblationConfig,
    EvalConfig,
    GrpoConfig,
    RunName,
    SftConfig,
    VariantConfig,
    config_text,
    load_config,
)
from sif_jax.errors import InputError
from sif_jax.evals.evaluate import evaluate
from sif_jax.evals.statistics import Summary, summarise
from sif_jax.evals.table import markdown_table
from sif_jax.training import grpo, sft
from sif_jax.training.run_dir import open_run

Kind = TypeVar("Kind", SftConfig, GrpoConfig, EvalConfig)
Training = TypeVar("Training", SftConfig, GrpoConfig)
Sample = Mapping[str, Any]


@dataclass(frozen=True)
class Runs:
    """The runs of one variant; a training may be that of an earlier variant."""

    sft: SftConfig | None
    grpo: GrpoConfig | None
    eval: EvalConfig


def run(config: AblationConfig) -> Path:
    """Run what is not finished, and return the path of the table, which is rewritten after every variant."""
    table, samples = Path(config.root) / "table.md", {}
    runs = plan(config)
    for name, variant in runs.items():
        print(f"== {name}", flush=True)
        if variant.sft:
            _train(sft.train, variant.sft)
        if variant.grpo:
            _train(grpo.train, variant.grpo)
        samples[name] = _read_samples(_evaluate(variant.eval))
        _write_tables(table, runs, samples)
    return table


def plan(config: AblationConfig) -> dict[str, Runs]:
    """Every run by variant.

    Raises:
      InputError: a stage's config is wrong, a records file is missing, or variants are evaluated on different records.
    """
    first: dict[str, Any] = {}  # of the trainings that are the same but for their name
    runs = {name: _variant(config, name, variant, first) for name, variant in config.variants.items()}
    stages = [stage for variant in runs.values() for stage in (variant.sft, variant.grpo, variant.eval) if stage]
    missing = [stage.data.path for stage in stages if not Path(stage.data.path).is_file()]
    if missing:
        raise InputError("no such records file", file=missing[0], fix="build it, or set data.path of that stage")
    held_out = {name: (variant.eval.data.path, variant.eval.data.limit) for name, variant in runs.items()}
    if len(set(held_out.values())) > 1:
        raise InputError("variants are evaluated on different records", value=held_out, expected="the same for all")
    return runs


def describe_plan(config: AblationConfig) -> str:
    """One line per variant: its runs, and which of them are finished, stopped halfway or new."""
    runs = plan(config)
    width = max(map(len, runs))
    return "\n".join(
        f"{name:{width}}  "
        + " → ".join(_state(stage.run) for stage in (variant.sft, variant.grpo, variant.eval) if stage)
        for name, variant in runs.items()
    )


def _state(run: RunName) -> str:
    if any((run.directory / result).exists() for result in ("model", "summary.json")):
        return f"{run.name} (finished)"
    return f"{run.name} ({'resumes' if (run.directory / 'config.yaml').exists() else 'new'})"


def _variant(config: AblationConfig, name: str, variant: VariantConfig, first: dict[str, Any]) -> Runs:
    def load(kind: type[Kind], stage: str, words: Sequence[str], own: Sequence[str], *model: str) -> Kind:
        path, *grid = words
        ours = [f"run.root={config.root}", f"run.name={stage}-{name}", *model]
        return load_config(kind, path, [*grid, *variant.all, *own, *ours])

    def shared(training: Training) -> Training:
        nameless = training.model_copy(update={"run": training.run.model_copy(update={"name": ""})})
        return first.setdefault(f"{type(training)} {config_text(nameless)}", training)

    tuned = load(SftConfig, "sft", config.sft, variant.sft or ())
    model = tuned.model.path
    sft_run = grpo_run = None
    if variant.sft is not None:
        sft_run = shared(tuned)
        model = str(sft_run.run.directory)
    if variant.grpo is not None:
        grpo_run = shared(load(GrpoConfig, "grpo", config.grpo, variant.grpo, f"model.path={model}"))
        model = str(grpo_run.run.directory)
    return Runs(sft_run, grpo_run, load(EvalConfig, "eval", config.eval, variant.eval, f"model.path={model}"))


def _train(train: Callable[[Training], Path], config: Training) -> None:
    if (config.run.directory / "model").is_dir():
        open_run(config)  # refuses a config that is not the one of this run
    else:
        train(config)


def _evaluate(config: EvalConfig) -> Path:
    """The samples of an evaluation that is done anew where its config or its model has changed since."""
    directory, model = config.run.directory, Path(config.model.path)
    summary = directory / "summary.json"
    trained = model / "model" if (model / "model").is_dir() else model
    is_current = (
        summary.exists()
        and summary.stat().st_mtime >= trained.stat().st_mtime
        and load_config(EvalConfig, directory / "config.yaml") == config
    )
    if not is_current:
        summary.unlink(missing_ok=True)
        evaluate(config)
    return directory / "samples.jsonl"


def _read_samples(path: Path) -> dict[str, Sample]:
    with path.open(encoding="utf-8") as lines:
        return {sample["id"]: sample for sample in map(json.loads, lines)}


def _write_tables(path: Path, runs: Mapping[str, Runs], samples: Mapping[str, Mapping[str, Sample]]) -> None:
    """`table.md` and `table.json`, of the variants that are done."""
    seed = next(iter(runs.values())).eval.run.seed
    first, *others = samples
    means = {name: summarise(list(of.values()), seed=seed) for name, of in samples.items()}
    gains = {name: summarise(paired_differences(samples[name], samples[first]), seed=seed) for name in others}
    text = markdown_table(means, heading="variant")
    if gains:
        text += f"\n\nDifference from {first}, question by question:\n\n" + markdown_table(gains, heading="variant")
    write_text(path, text + "\n")
    rows = {name: _row(runs[name], mean, gains.get(name)) for name, mean in means.items()}
    write_text(path.with_suffix(".json"), json.dumps({"baseline": first, "variants": rows}, indent=2) + "\n")


def paired_differences(samples: Mapping[str, Sample], baseline: Mapping[str, Sample]) -> list[Sample]:
    """Samples whose scores are those of `samples` less those of `baseline`; null where either is.

    Raises:
      InputError: they do not answer the same questions.
    """
    if samples.keys() != baseline.keys():
        raise InputError(
            "variants answered different questions",
            value=sorted(samples.keys() ^ baseline.keys()),
            expected="the same records, readable by all",
            fix="set data.on_error=raise for the evaluation, and repair the rows that it names",
        )
    return [_difference(sample, baseline[key]) for key, sample in samples.items()]


def _difference(sample: Sample, baseline: Sample) -> Sample:
    scores = {term: _less(value, baseline["scores"][term]) for term, value in sample["scores"].items()}
    return {**sample, "scores": scores, "judge": _less(sample["judge"], baseline["judge"])}


def _less(value: float | None, other: float | None) -> float | None:
    return None if value is None or other is None else value - other


def _row(runs: Runs, mean: Summary, gain: Summary | None) -> dict[str, Any]:
    directories = {stage: run and str(run.run.directory) for stage, run in vars(runs).items()}
    return directories | mean.to_json() | {"difference": gain and {name: asdict(i) for name, i in gain.metrics.items()}}
