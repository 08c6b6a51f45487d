"""Boxes as xyxy corners: areas, overlaps, and the frames they are given in (host).

Frames: *normalised* x/W, y/H of the whole image; *pixel* of the whole image; *padded square*, normalised by the longer
side of the image after it is padded to a centred square, as LLaVA and VisCoT do. A size is (width, height).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

Box = tuple[float, float, float, float]
Boxes = Sequence[Sequence[float | int]] | np.ndarray
Size = tuple[int, int]

WHOLE_IMAGE: Box = (0.0, 0.0, 1.0, 1.0)


def as_boxes(boxes: Boxes) -> Float[np.ndarray, "n 4"]:
    """Lists of boxes as one float64 array; no box gives shape [0, 4].

    Raises:
      ValueError: a box has not four numbers, or one is not finite.
    """
    array = np.asarray(boxes, np.float64)
    if array.size == 0:
        return np.zeros((0, 4))
    if array.ndim != 2 or array.shape[1] != 4 or not np.isfinite(array).all():
        raise ValueError(f"expected boxes [x1, y1, x2, y2] of finite numbers, got {boxes!r}")
    return array


def box_area(boxes: Float[np.ndarray, "n 4"]) -> Float[np.ndarray, "n"]:
    """Area of each box, in the square of its unit.

    Raises:
      ValueError: a box has x2 < x1 or y2 < y1, as xywh input often does.
    """
    extent = boxes[:, 2:] - boxes[:, :2]
    if (extent < 0).any():
        raise ValueError(f"inverted box {boxes[(extent < 0).any(axis=1)][0].tolist()}: expected x1 <= x2 and y1 <= y2")
    return extent.prod(axis=1)


def pairwise_iou(a: Float[np.ndarray, "n 4"], b: Float[np.ndarray, "m 4"]) -> Float[np.ndarray, "n m"]:
    """Intersection over union of every pair, in [0, 1]; 0 where both boxes are empty."""
    low = np.maximum(a[:, None, :2], b[None, :, :2])
    high = np.minimum(a[:, None, 2:], b[None, :, 2:])
    intersection = np.clip(high - low, 0, None).prod(axis=-1)
    union = box_area(a)[:, None] + box_area(b)[None, :] - intersection
    return np.divide(intersection, union, out=np.zeros_like(union), where=union > 0)


def union_area(boxes: Float[np.ndarray, "n 4"]) -> float:
    """Area that the boxes cover together, exactly, by coordinate compression."""
    xs, ys, (covered,) = coverage(boxes)
    return float(np.diff(xs) @ covered @ np.diff(ys))


def coverage(
    *box_sets: Float[np.ndarray, "_ 4"],
) -> tuple[np.ndarray, np.ndarray, list[np.ndarray]]:
    """The grid lines x and y of all boxes together, and per set which cells [x, y] it covers."""
    together = np.concatenate(box_sets)
    xs, ys = np.unique(together[:, 0::2]), np.unique(together[:, 1::2])
    return xs, ys, [_covered(boxes, xs, ys) for boxes in box_sets]


def _covered(boxes: np.ndarray, xs: np.ndarray, ys: np.ndarray) -> np.ndarray:
    in_x = (boxes[:, 0, None] <= xs[:-1]) & (xs[1:] <= boxes[:, 2, None])
    in_y = (boxes[:, 1, None] <= ys[:-1]) & (ys[1:] <= boxes[:, 3, None])
    return np.logical_or.reduce(in_x[:, :, None] & in_y[:, None, :], axis=0)


def to_pixels(boxes_norm: Float[np.ndarray, "n 4"], size: Size) -> Float[np.ndarray, "n 4"]:
    return boxes_norm * np.tile(size, 2)


def from_pixels(boxes_px: Float[np.ndarray, "n 4"], size: Size) -> Float[np.ndarray, "n 4"]:
    """Normalised boxes; rounding at the border of the image is clipped to it."""
    return np.clip(boxes_px / np.tile(size, 2), 0, 1)


def to_padded_square(boxes_norm: Float[np.ndarray, "n 4"], size: Size) -> Float[np.ndarray, "n 4"]:
    return (to_pixels(boxes_norm, size) + _padding(size)) / max(size)


def from_padded_square(boxes_square: Float[np.ndarray, "n 4"], size: Size) -> Float[np.ndarray, "n 4"]:
    """Normalised boxes of the image inside the square; what lies on the padding is clipped away."""
    return from_pixels(boxes_square * max(size) - _padding(size), size)


def _padding(size: Size) -> np.ndarray:
    """Left and top padding in pixels, rounded down as LLaVA's `expand2square` does."""
    width, height = size
    side = max(size)
    return np.tile([(side - width) // 2, (side - height) // 2], 2)
