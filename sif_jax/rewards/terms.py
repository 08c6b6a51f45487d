"""The four reward terms of a batch of traces, as one compiled program on any backend (pure)."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from sif_jax.rewards.depth import agrees
from sif_jax.rewards.depth_means import box_means
from sif_jax.rewards.geometry import batched_hiou
from sif_jax.rewards.packing import UNITS, TraceArrays


class Verdicts(NamedTuple):
    """What else is known of each completion; NumPy arrays, or traced ones."""

    format_holds: Bool[Any, "completion"]
    pairs_readable: Bool[Any, "completion"]
    judged: Float[Any, "completion"]
    valid: Bool[Any, "completion"]  # False: the judge failed
    previous: Float[Any, "completion"]  # equal to `judged` at a prompt's first visit


class Rules(NamedTuple):
    """Traced scalars, so that no choice of rewards compiles anew."""

    weights: Float[Any, "4"]  # format, answer, bbox, depth
    answer_progress: Bool[Any, ""]
    bbox_progress: Bool[Any, ""]
    clip_progress: Bool[Any, ""]
    fractional_depth: Bool[Any, ""]
    count_all: Bool[Any, ""]  # PIoU over the larger number of boxes


class Terms(NamedTuple):
    format: Float[Array, "completion"]
    answer: Float[Array, "completion"]
    bbox: Float[Array, "completion"]
    depth: Float[Array, "completion"]
    total: Float[Array, "completion"]
    hiou_first: Float[Array, "completion"]
    hiou_last: Float[Array, "completion"]
    hious: Float[Array, "completion area"]
    depth_consistency: Float[Array, "completion"]


@jax.jit
def reward_terms(traces: TraceArrays, verdicts: Verdicts, rules: Rules) -> Terms:
    """The terms as in `sif_jax.rewards.scoring`; 0 where nothing can be read or judged."""
    hious = area_hious(traces, rules.count_all)
    first, last = _first_and_last(traces)
    hiou_first, hiou_last = _at(hious, first), _at(hious, last)
    consistency = _depth_consistency(traces)

    def progress(now: Array, before: Array) -> Array:
        return jnp.where(rules.clip_progress, jnp.maximum(now - before, 0), now - before)

    judged = verdicts.judged + rules.answer_progress * progress(verdicts.judged, verdicts.previous)
    terms = (
        verdicts.format_holds.astype(jnp.float32),
        verdicts.valid * judged,
        hiou_last + rules.bbox_progress * progress(hiou_last, hiou_first),
        jnp.where(rules.fractional_depth, consistency, (consistency == 1) & verdicts.pairs_readable),
    )
    total = verdicts.valid * (rules.weights[:, None] * jnp.stack(terms)).sum(axis=0)
    return Terms(*terms, total, hiou_first, hiou_last, hious, consistency)


def area_hious(traces: TraceArrays, count_all: Bool[Array, ""]) -> Float[Array, "completion area"]:
    """HIoU of every area with the gold boxes; 0 for an area without boxes."""
    num_areas = traces.mask.shape[1]
    rows = [x.reshape(-1, *x.shape[2:]) for x in (traces.boxes, traces.mask)]
    gold = [jnp.repeat(x, num_areas, axis=0) for x in (traces.gold, traces.gold_mask)]
    hious = batched_hiou(*rows, *gold, count_all=count_all).reshape(-1, num_areas)
    return jnp.where(traces.mask.any(axis=2), hious, 0)


def _first_and_last(traces: TraceArrays) -> tuple[Int[Array, "completion"], Int[Array, "completion"]]:
    """The first area that is not the whole image, or else the last one, and the last one."""
    looked = traces.mask.any(axis=2)
    is_whole = (traces.boxes == jnp.array([0, 0, UNITS, UNITS])[None, None, None]).all(axis=3)
    focused = (traces.mask & ~is_whole).any(axis=2)
    last = looked.shape[1] - 1 - looked[:, ::-1].argmax(axis=1)
    return jnp.where(focused.any(axis=1), focused.argmax(axis=1), last), last


def _depth_consistency(traces: TraceArrays) -> Float[Array, "completion"]:
    """Share of all box-depth pairs that agree with the depth map; those that were cut do not."""
    boxes_per_completion = math.prod(traces.mask.shape[1:])
    map_index = jnp.repeat(jnp.maximum(traces.map_index, 0), boxes_per_completion)
    means = box_means(traces.depth_maps, map_index, traces.windows.reshape(-1, 4)).reshape(traces.mask.shape)
    hits = traces.mask & agrees(traces.depths, means) & (traces.map_index >= 0)[:, None, None]
    num_pairs = traces.mask.sum(axis=(1, 2)) + traces.num_cut
    return hits.sum(axis=(1, 2)) / jnp.maximum(num_pairs, 1)


def _at(values: Float[Array, "completion area"], area: Int[Array, "completion"]) -> Float[Array, "completion"]:
    return jnp.take_along_axis(values, area[:, None], axis=1)[:, 0]
