"""The stages that a report compares, and how their names and numbers are shown (host)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sif_jax.errors import InputError
from sif_jax.report.markup import Markup, element, join

# Okabe and Ito's palette, told apart with any colour vision; grey is the stage before training.
STAGE_COLOURS = ("#7a828c", "#0072b2", "#d55e00", "#009e73", "#cc79a7")
GAIN, LOSS, NEUTRAL = "#0072b2", "#d55e00", "#7a828c"


@dataclass(frozen=True)
class Stage:
    """A row of the comparison: the metrics of its training, and the samples with their `summary.json` of its evaluation."""

    name: str
    metrics_path: Path | None
    samples_path: Path | None

    def sample_paths(self) -> list[Path]:
        """What GRPO wrote beside its metrics, if this stage is one."""
        return sorted((self.metrics_path.parent / "samples").glob("step-*.jsonl")) if self.metrics_path else []

    def summary(self) -> dict[str, Any] | None:
        """None for a stage that was not evaluated.

        Raises:
          InputError: there are samples without a summary.
        """
        if self.samples_path is None:
            return None
        path = self.samples_path.with_name("summary.json")
        if not path.is_file():
            raise InputError("no summary beside the samples", file=path, fix="run sif-jax eval for this stage")
        return json.loads(path.read_text(encoding="utf-8"))


def stage_colours(stages: Sequence[Stage]) -> dict[str, str]:
    return {stage.name: STAGE_COLOURS[index % len(STAGE_COLOURS)] for index, stage in enumerate(stages)}


def stage_label(name: str, colours: Mapping[str, str]) -> Markup:
    return join(element("i", style=f"background:{colours[name]}", class_="swatch"), name)


def metric_label(name: str) -> str:
    return name.replace("_", " ").replace("hiou", "HIoU")


def decimals(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}".replace("-", "−")


def signed(value: float) -> str:
    return f"{value:+.2f}".replace("-", "−")
