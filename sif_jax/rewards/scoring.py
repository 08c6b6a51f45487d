"""The four reward terms of GRPO-SIF, from completions, records and judge scores to arrays (host; geometry is jitted).

    r_format = 1 if the completion follows the grammar exactly
    r_answer = s + (s - mean of the group's s at the previous visit); no second term at the first visit
    r_bbox   = h_last + (h_last - h_first), h the HIoU of an area with the gold boxes
    r_depth  = 1 if every box-depth pair of the trace is within 10 % of the depth map

h_first is that of the first area that is not the whole image; where only the whole image was looked at, h_first = h_last.
A trace without a readable area gets 0 for boxes and depth; a pair that cannot be read is not within 10 %.

`compat="release"` reproduces the authors' code: progress terms are clipped at 0, depth gets fractional credit, and the
format check accepts text outside the tags, empty areas, `"depth": true` and keys beside bbox_2d and depth.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Shaped

from sif_jax.config import RewardsConfig
from sif_jax.errors import InputError
from sif_jax.rewards.depth import depth_hits
from sif_jax.rewards.geometry import batched_hiou
from sif_jax.sif.boxes import WHOLE_IMAGE, Box
from sif_jax.sif.grammar import BoxDepth, Problem, Trace, parse
from sif_jax.sif.overlap import PairDenominator
from sif_jax.sif.record import Record

# Few static shapes, so few compilations: rows in multiples, boxes in powers of two.
_ROW_MULTIPLE = 64
_BOX_BUCKETS = (4, 8, 16, 32, 64)
MAX_BOXES = _BOX_BUCKETS[-1]
DEFAULT_REWARDS = RewardsConfig()
# Thousandths are whole numbers in float32.
_THOUSANDTHS = 1000.0

_UNREADABLE_PAIRS = frozenset(
    {
        Problem.TOO_LONG,
        Problem.AREA_NOT_JSON,
        Problem.AREA_NOT_LIST,
        Problem.ITEM_NOT_OBJECT,
        Problem.MISSING_KEY,
        Problem.BOX_NOT_FOUR_NUMBERS,
        Problem.BOX_OUTSIDE,
        Problem.BOX_INVERTED,
    }
)


@dataclasses.dataclass(frozen=True)
class _Rules:
    tolerated: frozenset[Problem]
    clip_progress: bool
    fractional_depth: bool


_RULES = {
    "paper": _Rules(frozenset(), clip_progress=False, fractional_depth=False),
    "release": _Rules(
        frozenset({Problem.OUTSIDE_TEXT, Problem.EMPTY_AREA, Problem.DEPTH_IS_BOOLEAN, Problem.EXTRA_KEY}),
        clip_progress=True,
        fractional_depth=True,
    ),
}


@dataclasses.dataclass(frozen=True)
class Scores:
    """Per completion: the reward terms and their weighted sum, and what they come from.

    `valid` is False where the judge failed; there `answer` and `total` are 0 and mean nothing. `depth_consistency` is the
    share of box-depth pairs within 10 %; `num_cut_boxes` counts the boxes of an area beyond `MAX_BOXES`.
    """

    format: Float[np.ndarray, "completion"]
    answer: Float[np.ndarray, "completion"]
    bbox: Float[np.ndarray, "completion"]
    depth: Float[np.ndarray, "completion"]
    total: Float[np.ndarray, "completion"]
    valid: Bool[np.ndarray, "completion"]
    hiou_first: Float[np.ndarray, "completion"]
    hiou_last: Float[np.ndarray, "completion"]
    hiou_gain: Float[np.ndarray, "completion"]
    depth_consistency: Float[np.ndarray, "completion"]
    num_areas: Int[np.ndarray, "completion"]
    num_cut_boxes: Int[np.ndarray, "completion"]
    well_formed: Bool[np.ndarray, "completion"]


def score(
    completions: Sequence[str],
    records: Sequence[Record],
    *,
    judge_scores: Sequence[float | int] | np.ndarray,
    previous_means: Sequence[float | int | None] | np.ndarray | None = None,
    depth_maps: Sequence[Float[np.ndarray, "_ _"] | None] | None = None,
    rewards: RewardsConfig = DEFAULT_REWARDS,
    **settings: Any,
) -> Scores:
    """Rewards of completion i for record i; `settings` go before those of `rewards`, as in compat="release".

    A judge score of NaN is a failed judgement. A previous mean of NaN or None is a first visit. Without a depth map the
    depth term is 0.

    Raises:
      InputError: the lengths differ, or a record has no, too many, or not normalised gold boxes.
    """
    count = len(completions)
    previous_means = [None] * count if previous_means is None else previous_means
    depth_maps = [None] * count if depth_maps is None else depth_maps
    _check_lengths(
        count, records=records, judge_scores=judge_scores, previous_means=previous_means, depth_maps=depth_maps
    )
    _check_records(records)

    rewards = RewardsConfig.model_validate(rewards.model_dump() | settings)
    rules = _RULES[rewards.compat]
    traces = [parse(completion) for completion in completions]
    judged = np.asarray(judge_scores, np.float64)
    valid = np.isfinite(judged)
    judged = np.where(valid, judged, 0)
    previous = np.asarray(previous_means, np.float64)

    areas = [_first_and_last_area(trace) for trace in traces]
    hiou_first, hiou_last = _hious(areas, records, rewards.pair_denominator)
    hits = [_depth_hits(trace, depth_map) for trace, depth_map in zip(traces, depth_maps)]
    consistency = np.array([pair_hits.mean() if pair_hits.size else 0.0 for pair_hits in hits])

    terms = {
        "format": np.array([float(_problems(trace) <= rules.tolerated) for trace in traces]),
        "answer": np.where(valid, judged + rewards.answer_progress * _progress(judged, previous, rules), 0),
        "bbox": hiou_last + rewards.bbox_progress * _progress(hiou_last, hiou_first, rules),
        "depth": consistency if rules.fractional_depth else _all_consistent(consistency, traces),
    }
    return Scores(
        **terms,
        total=np.where(valid, sum(weight * terms[name] for name, weight in rewards.weights.items()), 0),
        valid=valid,
        hiou_first=hiou_first,
        hiou_last=hiou_last,
        hiou_gain=hiou_last - hiou_first,
        depth_consistency=consistency,
        num_areas=np.array([len(trace.areas) for trace in traces], np.int64),
        num_cut_boxes=np.array([sum(max(len(area) - MAX_BOXES, 0) for area in pair) for pair in areas], np.int64),
        well_formed=np.array([trace.well_formed for trace in traces], bool),
    )


def _progress(now: np.ndarray, before: np.ndarray, rules: _Rules) -> np.ndarray:
    gain = np.where(np.isnan(before), 0, now - before)
    return np.maximum(gain, 0) if rules.clip_progress else gain


def _problems(trace: Trace) -> set[Problem]:
    return {violation.problem for violation in trace.violations}


def _all_consistent(consistency: np.ndarray, traces: Sequence[Trace]) -> np.ndarray:
    readable = np.array([_problems(trace).isdisjoint(_UNREADABLE_PAIRS) for trace in traces], bool)
    return ((consistency == 1) & readable).astype(np.float64)


def _depth_hits(trace: Trace, depth_map: np.ndarray | None) -> Shaped[np.ndarray, "pair"]:
    if depth_map is None:
        return np.zeros(0, bool)
    return depth_hits((pair for area in trace.areas for pair in area), depth_map)


def _first_and_last_area(trace: Trace) -> tuple[tuple[BoxDepth, ...], tuple[BoxDepth, ...]]:
    if not trace.areas:
        return (), ()
    last = trace.areas[-1]
    return next((area for area in trace.areas if not _is_whole_image(area)), last), last


def _is_whole_image(area: tuple[BoxDepth, ...]) -> bool:
    return all(pair.box_norm == WHOLE_IMAGE for pair in area)


def _hious(
    areas: Sequence[tuple[tuple[BoxDepth, ...], tuple[BoxDepth, ...]]],
    records: Sequence[Record],
    pair_denominator: PairDenominator,
) -> tuple[Float[np.ndarray, "completion"], Float[np.ndarray, "completion"]]:
    pred = [tuple(pair.box_norm for pair in area[:MAX_BOXES]) for both in areas for area in both]
    gold = [record.gold_boxes for record in records for _ in ("first", "last")]
    most = max((len(boxes) for boxes in (*pred, *gold)), default=0)
    num_boxes = next(bucket for bucket in _BOX_BUCKETS if most <= bucket)
    hiou = batched_hiou(*_pad(pred, num_boxes), *_pad(gold, num_boxes), pair_denominator=pair_denominator)
    first, last = np.asarray(hiou, np.float64)[: len(pred)].reshape(-1, 2).T
    return first, last


def _pad(box_sets: Sequence[Sequence[Box]], num_boxes: int) -> tuple[Float[Array, "row box 4"], Bool[Array, "row box"]]:
    num_rows = -(-max(len(box_sets), 1) // _ROW_MULTIPLE) * _ROW_MULTIPLE
    boxes, mask = np.zeros((num_rows, num_boxes, 4), np.float32), np.zeros((num_rows, num_boxes), bool)
    for row, box_set in enumerate(box_sets):
        mask[row, : len(box_set)] = True
        boxes[row, : len(box_set)] = np.array(box_set).reshape(-1, 4) * _THOUSANDTHS
    return jnp.asarray(boxes), jnp.asarray(mask)


def _check_lengths(count: int, **per_completion: Sequence | np.ndarray) -> None:
    for name, values in per_completion.items():
        if len(values) != count:
            raise InputError(f"{name} does not match the completions", value=len(values), expected=f"{count}, one each")


def _check_records(records: Sequence[Record]) -> None:
    for row, record in enumerate(records, 1):
        if record.frame != "normalised":
            raise InputError(
                "gold boxes are in the wrong frame",
                row=row,
                value=record.frame,
                expected="normalised",
                fix="convert its boxes with sif_jax.sif.boxes",
            )
        if not 0 < len(record.gold_boxes) <= MAX_BOXES:
            raise InputError(
                "the number of gold boxes cannot be rewarded",
                row=row,
                value=len(record.gold_boxes),
                expected=f"1 to {MAX_BOXES}",
                fix="leave the row out of reinforcement learning",
            )
