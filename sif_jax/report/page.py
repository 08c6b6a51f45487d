"""Writes the report of a run: one HTML file that needs nothing else, not even scripts (io)."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from sif_jax.errors import InputError
from sif_jax.report import sections
from sif_jax.report.curves import read_curves
from sif_jax.report.markup import Markup, element, join
from sif_jax.report.samples import Sample, choose, choose_steps, read_groups, read_samples
from sif_jax.report.stages import Stage, stage_colours
from sif_jax.report.style import STYLE

MAX_QUESTIONS = 16  # per section of traces; a question takes about 150 kB


def write_report(
    path: Path,
    *,
    title: str,
    facts: Mapping[str, str],
    stages: Sequence[Stage],
    extra_samples: Mapping[str, Mapping[str, Path]] | None = None,
) -> None:
    """Write the report atomically.

    `facts` are shown as given. The questions of the last evaluated stage are ranked to choose which traces to show.
    `extra_samples` adds sections of traces: heading, then stage, then samples file; its first questions are shown.

    Raises:
      InputError: a file is missing or malformed, or `extra_samples` names a stage that is not in `stages`.
    """
    names = [stage.name for stage in stages]
    if unknown := [name for paths in (extra_samples or {}).values() for name in paths if name not in names]:
        raise InputError("extra samples of an unknown stage", value=unknown[0], expected=f"one of {names}")
    colours = stage_colours(stages)
    summaries = {stage.name: summary for stage in stages if (summary := stage.summary())}
    parts = [sections.header(title, facts)]
    if summaries:
        parts += [sections.results(summaries, colours), sections.families(summaries, colours)]
    for stage in stages:
        if stage.metrics_path:
            parts.append(sections.training(stage.name, read_curves(stage.metrics_path), colours[stage.name]))
    for number, stage in enumerate(stages):
        if chosen_steps := choose_steps(stage.sample_paths()):
            groups = {step: read_groups(path) for step, path in chosen_steps.items()}
            parts.append(sections.rollouts(stage.name, f"rollout-{number}", groups))
    held_out = {stage.name: read_samples(stage.samples_path) for stage in stages if stage.samples_path}
    if held_out:
        chosen = dict(list(choose(_last(held_out)).items())[:MAX_QUESTIONS])
        parts.append(sections.traces("Traces of held-out questions", "held-out", chosen, held_out, colours))
    for number, (heading, paths) in enumerate((extra_samples or {}).items()):
        samples = {stage: read_samples(path) for stage, path in paths.items()}
        chosen = {sample.id: heading for sample in _last(samples)[:MAX_QUESTIONS]}
        parts.append(sections.traces(heading, f"extra-{number}", chosen, samples, colours))
    _write_atomically(Path(path), _document(title, parts))


def _last(samples: Mapping[str, Mapping[str, Sample]]) -> list[Sample]:
    return list(list(samples.values())[-1].values())


def _document(title: str, parts: Sequence[Markup]) -> str:
    head = element(
        "head",
        Markup('<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'),
        element("title", title),
        element("style", STYLE),
    )
    return f'<!doctype html>\n<html lang="en">{join(head, element("body", *parts))}</html>\n'


def _write_atomically(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            file.write(text.encode("utf-8", "replace"))  # a model may sample half of a surrogate pair
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
