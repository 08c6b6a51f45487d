"""One table of stages by metrics with their intervals, as plain text or Markdown (host)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from sif_jax.evals.statistics import METRICS, Interval, Summary


def text_table(stages: Mapping[str, Summary]) -> str:
    """Rows are stages, cells are `mean [low, high]`; under 140 columns wide for stage names up to 20 characters."""
    rows = _rows(stages, "stage")
    widths = [max(map(len, column)) for column in zip(*rows)]
    rule = "  ".join("-" * width for width in widths)
    header, *body = ("  ".join(_align(row, widths)).rstrip() for row in rows)
    return "\n".join([header, rule, *body, "", _note(stages)])


def markdown_table(stages: Mapping[str, Summary], *, heading: str = "stage") -> str:
    header, *body = ("| " + " | ".join(row) + " |" for row in _rows(stages, heading))
    rule = "|---|" + "---:|" * (len(METRICS) + 1)
    return "\n".join([header, rule, *body, "", _note(stages)])


def _rows(stages: Mapping[str, Summary], heading: str) -> list[list[str]]:
    header = [heading, "n", *(metric_label(name) for name in METRICS)]
    return [header, *([name, str(s.questions), *_cells(s.metrics)] for name, s in stages.items())]


def metric_label(name: str) -> str:
    return name.replace("_", " ").replace("hiou", "HIoU").replace("consistency", "consist.").replace("accuracy", "acc.")


def _cells(metrics: Mapping[str, Interval]) -> list[str]:
    return [_cell(metrics[name]) if name in metrics else "–" for name in METRICS]


def _cell(interval: Interval) -> str:
    return f"{interval.mean:.2f} [{interval.low:.2f}, {interval.high:.2f}]"


def _align(row: Sequence[str], widths: Sequence[int]) -> list[str]:
    return [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:]))]


def _note(stages: Mapping[str, Summary]) -> str:
    scenes = ", ".join(f"{name} {summary.scenes}" for name, summary in stages.items())
    return f"mean [95 % bootstrap interval over scenes]; scenes: {scenes}"
