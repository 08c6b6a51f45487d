"""What a policy writes, step by step: samples/step-N.jsonl, and a few traces drawn for whoever watches the run (io).

One line per completion: the fields of an evaluation's samples, and `step`, `group` (the prompt's place in the step),
`prompt`, `sample`, `areas` and `advantage`. What a judgement that failed leaves unknown is null.
"""

from __future__ import annotations

import itertools
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int
from PIL import Image

from sif_jax.atomic import write_text
from sif_jax.config import GrpoConfig
from sif_jax.data.feed import Feed
from sif_jax.parallel.distributed import is_first
from sif_jax.rollout.engine import Rollout
from sif_jax.sif.grammar import BoxDepth, parse
from sif_jax.sif.prompts import user_text
from sif_jax.training.feedback import Feedback
from sif_jax.training.metrics import MetricsLog, NoLog
from sif_jax.training.trace_picture import draw_trace

SCORES = ("format", "answer", "bbox", "depth", "total", "hiou_first", "hiou_last", "hiou_gain", "depth_consistency")
JUDGED = ("answer", "total")
SHOWN = ("format", "answer", "bbox", "depth", "total")
GROUPS_SHOWN = 4  # of each, the best and the worst completion are drawn

Row = Mapping[str, Any]


class SampleLog:
    """Writes the first step and every `run.samples_every`-th; a step that is repeated replaces its file."""

    def __init__(self, directory: Path, config: GrpoConfig, feed: Feed, log: MetricsLog | NoLog) -> None:
        self._directory, self._log = directory / "samples", log
        self._every, self._prompt, self._feed = config.run.samples_every, config.prompt, feed

    def log(self, step: int, ids: Int[np.ndarray, " P"], rollout: Rollout, feedback: Feedback) -> None:
        if not is_first() or self._every is None or (step > 0 and (step + 1) % self._every):
            return
        rows = [
            {"step": step, "group": group} | self._question(int(index)) | answer
            for group, (index, answers) in enumerate(zip(ids, _answers(rollout, feedback), strict=True))
            for answer in answers
        ]
        lines = "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows)
        write_text(self._directory / f"step-{step}.jsonl", lines)
        if self._log.shows_pictures:
            shown = best_and_worst(rows)
            self._log.log_table(step, "rollouts", [_shown(row) for row in shown], [self._draw(row) for row in shown])

    def _question(self, index: int) -> dict[str, Any]:
        record, file = self._feed.records[index], self._feed.file
        return {
            "id": str(file.rows[index]),
            "scene": str(record.extra.get("scene", record.image)),
            "family": str(record.extra.get("family", record.dataset)),
            "image": self._relative(record.image),
            "depth_image": record.depth_image and self._relative(record.depth_image),
            "problem": record.problem,
            "prompt": user_text(record.problem, self._prompt.depth_input, self._prompt.with_depth_words),
            "gold_boxes": record.gold_boxes,
            "response": record.response,
        }

    def _relative(self, image: str) -> str:
        return os.path.relpath(self._feed.file.image_root / image, self._directory)

    def _draw(self, row: Row) -> Image.Image:
        depth_image = row["depth_image"] and self._directory / row["depth_image"]
        return draw_trace(parse(row["completion"]), row["gold_boxes"], self._directory / row["image"], depth_image)


def best_and_worst(rows: Sequence[Row]) -> list[Row]:
    """By advantage, of each of the first groups; rows come group by group."""
    groups = [list(group) for _, group in itertools.groupby(rows, key=lambda row: row["group"])][:GROUPS_SHOWN]
    return [choose(group, key=lambda row: row["advantage"]) for group in groups for choose in (max, min)]


def _answers(rollout: Rollout, feedback: Feedback) -> list[list[dict[str, Any]]]:
    """What is known of each completion, prompt by prompt."""
    finished = np.asarray(rollout.finished)
    prompts, samples = finished.shape
    scores = {term: getattr(feedback.scores, term).reshape(prompts, samples) for term in SCORES}
    for term in JUDGED:
        scores[term] = np.where(np.isfinite(feedback.judged), scores[term], np.nan)
    return [
        [
            {
                "sample": sample,
                "completion": feedback.completions[prompt * samples + sample],
                "areas": _areas(feedback.completions[prompt * samples + sample]),
                "scores": {term: _finite(values[prompt, sample]) for term, values in scores.items()},
                "judge": _finite(feedback.judged[prompt, sample]),
                "advantage": float(feedback.advantages[prompt, sample]),
                "finish_reason": "stop" if finished[prompt, sample] else "length",
            }
            for sample in range(samples)
        ]
        for prompt in range(prompts)
    ]


def _areas(completion: str) -> list[list[dict[str, Any]]]:
    def item(pair: BoxDepth) -> dict[str, Any]:
        return {"bbox_2d": list(pair.box_norm), "depth": _finite(pair.depth)}

    return [[item(pair) for pair in area] for area in parse(completion).areas]


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _shown(row: Row) -> dict[str, str | float | None]:
    return {
        "record": row["id"],
        "question": row["problem"],
        "gold answer": row["response"],
        "completion": row["completion"],
        **{term: row["scores"][term] for term in SHOWN},
        "judge": row["judge"],
        "advantage": row["advantage"],
    }
