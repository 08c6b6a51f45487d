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

import numpy as np
from jaxtyping import Bool, Float, Int

from sif_jax.config import RewardsConfig
from sif_jax.errors import InputError
from sif_jax.rewards.packing import MAX_BOXES, pack
from sif_jax.rewards.terms import Rules, Verdicts, reward_terms
from sif_jax.sif.grammar import Problem, Trace, parse
from sif_jax.sif.record import Record

DEFAULT_REWARDS = RewardsConfig()

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
_TOLERATED = {
    "paper": frozenset(),
    "release": frozenset({Problem.OUTSIDE_TEXT, Problem.EMPTY_AREA, Problem.DEPTH_IS_BOOLEAN, Problem.EXTRA_KEY}),
}


@dataclasses.dataclass(frozen=True)
class Scores:
    """Per completion: the reward terms and their weighted sum, and what they come from.

    `valid` is False where the judge failed; there `answer` and `total` are 0 and mean nothing. `depth_consistency` is the
    share of box-depth pairs within 10 %; `hious` has every area's HIoU, 0 beyond the last one; `num_cut_boxes` counts the
    boxes that no array had room for.
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
    hious: Float[np.ndarray, "completion area"]
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
    traces = [parse(completion) for completion in completions]
    packed = pack(traces, records, depth_maps)
    verdicts = _verdicts(traces, judge_scores, previous_means, rewards, len(packed.mask))
    terms = {
        name: np.asarray(values, np.float64)[:count]
        for name, values in reward_terms(packed, verdicts, _rules(rewards))._asdict().items()
    }
    return Scores(
        **terms,
        valid=np.asarray(verdicts.valid[:count]),
        hiou_gain=terms["hiou_last"] - terms["hiou_first"],
        num_areas=np.array([len(trace.areas) for trace in traces], np.int64),
        num_cut_boxes=packed.num_cut[:count].astype(np.int64),
        well_formed=np.array([trace.well_formed for trace in traces], bool),
    )


def _verdicts(
    traces: Sequence[Trace],
    judge_scores: Sequence[float | int] | np.ndarray,
    previous_means: Sequence[float | int | None] | np.ndarray,
    rewards: RewardsConfig,
    num_rows: int,
) -> Verdicts:
    problems = [{violation.problem for violation in trace.violations} for trace in traces]
    judged, previous = np.asarray(judge_scores, np.float32), np.array(previous_means, np.float32)
    valid = np.isfinite(judged)
    judged = np.where(valid, judged, 0)
    values = (
        np.array([found <= _TOLERATED[rewards.compat] for found in problems], bool),
        np.array([found.isdisjoint(_UNREADABLE_PAIRS) for found in problems], bool),
        judged,
        valid,
        np.where(np.isfinite(previous), previous, judged),
    )
    return Verdicts(*(np.pad(value, (0, num_rows - len(value))) for value in values))


def _rules(rewards: RewardsConfig) -> Rules:
    return Rules(
        weights=np.array(list(rewards.weights.values()), np.float32),
        answer_progress=np.array(rewards.answer_progress),
        bbox_progress=np.array(rewards.bbox_progress),
        clip_progress=np.array(rewards.compat == "release"),
        fractional_depth=np.array(rewards.compat == "release"),
        count_all=np.array(rewards.pair_denominator == "max"),
    )


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
        if not all(0 <= v <= 1 for box in record.gold_boxes for v in box):
            raise InputError(
                "a gold box is outside the image", row=row, value=record.gold_boxes, expected="coordinates in [0, 1]"
            )
        if not 0 < len(record.gold_boxes) <= MAX_BOXES:
            raise InputError(
                "the number of gold boxes cannot be rewarded",
                row=row,
                value=len(record.gold_boxes),
                expected=f"1 to {MAX_BOXES}",
                fix="leave the row out of reinforcement learning",
            )
