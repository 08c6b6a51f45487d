"""Traces, gold boxes and depth maps as padded arrays of few shapes, so that scoring them compiles seldom (host)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Float32, Int32, Int64

from sif_jax.errors import InputError
from sif_jax.sif.depth_codec import pixel_windows
from sif_jax.sif.grammar import BoxDepth, Trace
from sif_jax.sif.record import Record

UNITS_PER_THOUSANDTH = 2**20
UNITS = 1000 * UNITS_PER_THOUSANDTH
MAX_AREAS = MAX_BOXES = 64
MAX_SIDE = 4088
_FEW = 8
_MIN_COMPLETIONS = 16
_MIN_SIDE = 256

DepthMap = Float[np.ndarray, "_ _"]


class TraceArrays(NamedTuple):
    """NumPy arrays, or traced ones.

    Boxes are xyxy in whole numbers of 1/UNITS of the image; windows (y1, x1, y2, x2) in pixels of the depth map.
    """

    boxes: Int32[Any, "completion area box 4"]
    mask: Bool[Any, "completion area box"]
    depths: Float32[Any, "completion area box"]  # -1 where the depth cannot be read
    windows: Int32[Any, "completion area box 4"]
    num_cut: Int32[Any, "completion"]  # boxes for which there was no room
    gold: Int32[Any, "completion gold 4"]
    gold_mask: Bool[Any, "completion gold"]
    map_index: Int32[Any, "completion"]  # -1: no depth map
    depth_maps: Float32[Any, "map H W"]


def pack(traces: Sequence[Trace], records: Sequence[Record], depth_maps: Sequence[DepthMap | None]) -> TraceArrays:
    """Sizes are powers of two, or one of few. Of more than 64 areas the first 63 and the last are kept.

    Raises:
      InputError: a depth map is larger than 4088 pixels on a side.
    """
    areas = [_kept_areas(trace) for trace in traces]
    kept = [[area[:MAX_BOXES] for area in each] for each in areas]
    count = power_of_two(len(traces), at_least=_MIN_COMPLETIONS)
    num_areas = _FEW if max(map(len, kept), default=0) <= _FEW else MAX_AREAS
    shape = (count, num_areas, _num_boxes([len(area) for each in kept for area in each]))
    index, pairs = _flat_pairs(kept)
    maps, map_index = _stack(depth_maps, count)
    sizes = np.array([(1, 1) if depth is None else depth.shape[::-1] for depth in depth_maps], np.int64).reshape(-1, 2)
    gold_shape = (count, _num_boxes([len(record.gold_boxes) for record in records]))
    gold_index, gold = _flat_gold(records)
    return TraceArrays(
        boxes=_scatter(shape, index, to_units(pairs[:, :4])),
        mask=_scatter(shape, index, np.ones(len(pairs), bool)),
        depths=_scatter(shape, index, np.nan_to_num(pairs[:, 4], nan=-1).astype(np.float32)),
        windows=_scatter(shape, index, pixel_windows(pairs[:, :4], sizes[index[:, 0]])),
        num_cut=_padded([sum(map(len, trace.areas)) - sum(map(len, each)) for trace, each in zip(traces, kept)], count),
        gold=_scatter(gold_shape, gold_index, to_units(gold)),
        gold_mask=_scatter(gold_shape, gold_index, np.ones(len(gold), bool)),
        map_index=map_index,
        depth_maps=maps,
    )


def to_units(boxes_norm: Float[np.ndarray, "*boxes 4"]) -> Int32[np.ndarray, "*boxes 4"]:
    return np.rint(boxes_norm * UNITS).astype(np.int32)


def power_of_two(count: int, *, at_least: int) -> int:
    return max(at_least, 1 << (count - 1).bit_length())


def _kept_areas(trace: Trace) -> tuple[tuple[BoxDepth, ...], ...]:
    areas = trace.areas
    return areas if len(areas) <= MAX_AREAS else (*areas[: MAX_AREAS - 1], areas[-1])


def _num_boxes(counts: Sequence[int]) -> int:
    return _FEW if max(counts, default=0) <= _FEW else MAX_BOXES


def _flat_pairs(
    areas: Sequence[Sequence[Sequence[BoxDepth]]],
) -> tuple[Int64[np.ndarray, "pair 3"], Float[np.ndarray, "pair 5"]]:
    """Completion, area and box of each pair, and its box and depth."""
    rows = [
        (c, a, b, *pair.box_norm, pair.depth)
        for c, each in enumerate(areas)
        for a, area in enumerate(each)
        for b, pair in enumerate(area)
    ]
    flat = np.array(rows, np.float64).reshape(-1, 8)
    return flat[:, :3].astype(np.int64), flat[:, 3:]


def _flat_gold(records: Sequence[Record]) -> tuple[Int64[np.ndarray, "gold 2"], Float[np.ndarray, "gold 4"]]:
    rows = [(r, b, *box) for r, record in enumerate(records) for b, box in enumerate(record.gold_boxes)]
    flat = np.array(rows, np.float64).reshape(-1, 6)
    return flat[:, :2].astype(np.int64), flat[:, 2:]


def _scatter(shape: tuple[int, ...], index: Int64[np.ndarray, "n axis"], values: np.ndarray) -> np.ndarray:
    array = np.zeros(shape + values.shape[1:], values.dtype)
    array[tuple(index.T)] = values
    return array


def _padded(values: Sequence[int], count: int) -> Int32[np.ndarray, "completion"]:
    return np.pad(np.array(values, np.int32), (0, count - len(values)))


def _stack(
    depth_maps: Sequence[DepthMap | None], count: int
) -> tuple[Float32[np.ndarray, "map H W"], Int32[np.ndarray, "completion"]]:
    """Each distinct map once, and the map of each completion."""
    distinct = {id(depth): depth for depth in depth_maps if depth is not None}
    numbers = {key: number for number, key in enumerate(distinct)}
    index = np.full(count, -1, np.int32)
    index[: len(depth_maps)] = [-1 if depth is None else numbers[id(depth)] for depth in depth_maps]
    sides = [max((depth.shape[axis] for depth in distinct.values()), default=1) for axis in (0, 1)]
    if max(sides) > MAX_SIDE:
        raise InputError("a depth map is too large", value=max(sides), expected=f"at most {MAX_SIDE} pixels on a side")
    height, width = (power_of_two(side, at_least=_MIN_SIDE) for side in sides)
    stacked = np.zeros((power_of_two(len(distinct), at_least=1), height, width), np.float32)
    for number, depth in enumerate(distinct.values()):
        stacked[number, : depth.shape[0], : depth.shape[1]] = depth
    return stacked, index
