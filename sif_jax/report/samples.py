"""Reads the samples of an evaluation and of a training, and chooses which to show (host)."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

from sif_jax.errors import InputError
from sif_jax.sif.boxes import Box

SCORES = ("format", "answer", "bbox", "depth", "total", "hiou_first", "hiou_last")
STEPS_SHOWN = 4


@dataclass(frozen=True)
class Sample:
    """One answered question; `image` and `depth_image` are resolved against the folder of the samples file."""

    id: str
    scene: str
    family: str
    image: Path
    depth_image: Path | None
    problem: str
    gold_boxes: tuple[Box, ...]
    response: str
    completion: str
    scores: Mapping[str, float | None]
    judge: float | None
    finish_reason: str


@dataclass(frozen=True)
class Attempt(Sample):
    """One of a group of completions that a policy in training learns from."""

    group: int
    sample: int
    advantage: float


Kind = TypeVar("Kind", bound=Sample)


def read_samples(path: Path) -> dict[str, Sample]:
    """Samples by id, in the order of the file.

    Raises:
      InputError: a line is not a JSON object with every field of a sample.
    """
    return {sample.id: sample for sample in _read(path, Sample)}


def read_groups(path: Path) -> list[list[Attempt]]:
    """The groups of one training step, as GRPO writes them.

    Raises:
      InputError: a line is not a JSON object with every field of an attempt.
    """
    return [list(group) for _, group in itertools.groupby(_read(path, Attempt), key=lambda attempt: attempt.group)]


def _read(path: Path, kind: type[Kind]) -> list[Kind]:
    with path.open(encoding="utf-8") as lines:
        samples = [_sample(kind, path, number, line) for number, line in enumerate(lines, start=1)]
    if not samples:
        raise InputError("no samples", file=path, expected="one JSON object per line", fix="make the file again")
    return samples


def _sample(kind: type[Kind], path: Path, number: int, line: str) -> Kind:
    try:
        row = json.loads(line)
        values = {field.name: row[field.name] for field in fields(kind)}
        values["scores"] = {name: _number(row["scores"][name]) for name in SCORES}
        depth_image = values["depth_image"] and path.parent / values["depth_image"]
        boxes = tuple((x1, y1, x2, y2) for x1, y1, x2, y2 in (map(float, box) for box in values["gold_boxes"]))
        judge = _number(values["judge"])
    except (json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
        expected = f"{', '.join(field.name for field in fields(kind))}, and in scores {', '.join(SCORES)}"
        raise InputError(f"not a sample ({error!r})", file=path, row=number, value=line, expected=expected) from error
    return kind(
        **values
        | {"image": path.parent / values["image"], "depth_image": depth_image or None}
        | {"gold_boxes": boxes, "judge": judge}
    )


def _number(value: Any) -> float | None:
    return None if value is None else float(value)


def choose(samples: Sequence[Sample], *, each: int = 2) -> dict[str, str]:
    """Why a question is shown, by its id: the best, middle and worst by total reward, and the middle of every family."""
    ranked = sorted(samples, key=_total, reverse=True)
    middle = max(0, (len(ranked) - each) // 2)
    reasons = {
        "highest total reward": ranked[:each],
        "typical: median total reward": ranked[middle : middle + each],
        "lowest total reward": ranked[-each:],
    }
    for family in sorted({sample.family for sample in samples}):
        of_family = [sample for sample in ranked if sample.family == family]
        reasons[f"median of {family}"] = [of_family[len(of_family) // 2]]
    chosen: dict[str, str] = {}
    for reason, questions in reasons.items():
        for sample in questions:
            chosen.setdefault(sample.id, reason)
    return chosen


def choose_steps(paths: Sequence[Path]) -> dict[int, Path]:
    """The first, the last and evenly spaced files of `step-N.jsonl` between them, by step."""
    by_step = sorted((int(path.stem.removeprefix("step-")), path) for path in paths)
    places = {round(i * (len(by_step) - 1) / (STEPS_SHOWN - 1)) for i in range(STEPS_SHOWN)} if by_step else set()
    return dict(by_step[place] for place in sorted(places))


def choose_groups(groups: Sequence[Sequence[Attempt]]) -> dict[str, list[Attempt]]:
    """Why a group is shown, and its attempts, highest reward first: the widest and the median spread of rewards."""
    ranked = sorted((sorted(group, key=_total, reverse=True) for group in groups), key=_spread, reverse=True)
    chosen = {"median spread of rewards": ranked[len(ranked) // 2]} if len(ranked) > 1 else {}
    return {"widest spread of rewards": ranked[0]} | chosen


def _spread(group: Sequence[Sample]) -> float:
    totals = [total for sample in group if (total := sample.scores["total"]) is not None]
    return max(totals) - min(totals) if totals else 0.0


def _total(sample: Sample) -> float:
    total = sample.scores["total"]
    return -math.inf if total is None else total
