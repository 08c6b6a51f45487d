"""HIoU of many areas at once, with masks (pure).

HIoU = (GIoU + PIoU) / 2 as in `sif_jax.sif.overlap`, which is the exact reference. Coordinates are whole numbers of
1/UNITS of the image: thousandths are exact, anything else is off by at most 5e-10 (which shows only in boxes far thinner
than a thousandth), and differences are exact, which in float32 they are not. They may lie outside, within (-2, 2).
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int32, UInt32

from sif_jax.rewards.assignment import best_total
from sif_jax.rewards.packing import UNITS_PER_THOUSANDTH

_ROWS_AT_ONCE = 4096
_WORD_BITS = 32


def batched_hiou(
    pred: Int32[Array, "row n 4"],
    pred_mask: Bool[Array, "row n"],
    gold: Int32[Array, "row m 4"],
    gold_mask: Bool[Array, "row m"],
    *,
    count_all: Bool[Array, ""] | bool = False,
) -> Float[Array, "row"]:
    """HIoU of each row's unmasked boxes, in [0, 1]; 1 when both sets are empty, 0 when one is.

    PIoU is over the smaller number of boxes, or with `count_all` over the larger one. At most 4096 rows, or a multiple
    of 4096.
    """
    rows_at_once = min(len(pred), _ROWS_AT_ONCE)
    chunks = [x.reshape(-1, rows_at_once, *x.shape[1:]) for x in (pred, pred_mask, gold, gold_mask)]
    return lax.map(lambda rows: _hiou(*rows, count_all=count_all), tuple(chunks)).ravel()


def _hiou(
    pred: Int32[Array, "row n 4"],
    pred_mask: Bool[Array, "row n"],
    gold: Int32[Array, "row m 4"],
    gold_mask: Bool[Array, "row m"],
    *,
    count_all: Bool[Array, ""] | bool,
) -> Float[Array, "row"]:
    num_pred, num_gold = pred_mask.sum(axis=1), gold_mask.sum(axis=1)
    num_pairs = jnp.where(count_all, jnp.maximum(num_pred, num_gold), jnp.minimum(num_pred, num_gold))
    pred, gold = _corners(pred, pred_mask), _corners(gold, gold_mask)
    pairs = _matched_iou(pred, gold) / jnp.maximum(num_pairs, 1)
    return jnp.where((num_pred == 0) & (num_gold == 0), 1.0, (_global_iou(pred, gold) + pairs) / 2)


def _corners(boxes: Int32[Array, "row n 4"], mask: Bool[Array, "row n"]) -> Int32[Array, "4 n row"]:
    """Rows last, so that every operation is one over all rows; a masked or inverted box becomes a point."""
    x1, y1, x2, y2 = jnp.where(mask[..., None], boxes, 0).T
    return jnp.stack([x1, y1, jnp.maximum(x1, x2), jnp.maximum(y1, y2)])


def _matched_iou(pred: Int32[Array, "4 n row"], gold: Int32[Array, "4 m row"]) -> Float[Array, "row"]:
    """Total IoU of the best one-to-one matching."""
    few, many = sorted((pred, gold), key=lambda boxes: boxes.shape[1])
    return best_total(jnp.moveaxis(_pairwise_iou(few, many), -1, 0))


def _pairwise_iou(a: Int32[Array, "4 n row"], b: Int32[Array, "4 m row"]) -> Float[Array, "n m row"]:
    x1, y1 = jnp.maximum(a[:2, :, None], b[:2, None])
    x2, y2 = jnp.minimum(a[2:, :, None], b[2:, None])
    intersection = _thousandths(jnp.maximum(x2 - x1, 0)) * _thousandths(jnp.maximum(y2 - y1, 0))
    union = _area(a)[:, None] + _area(b)[None] - intersection
    return intersection / jnp.where(union > 0, union, 1)


def _area(boxes: Int32[Array, "4 n row"]) -> Float[Array, "n row"]:
    return _thousandths(boxes[2] - boxes[0]) * _thousandths(boxes[3] - boxes[1])


def _global_iou(pred: Int32[Array, "4 n row"], gold: Int32[Array, "4 m row"]) -> Float[Array, "row"]:
    """IoU of the two unions, on the grid of all corner coordinates, one strip of it after the other."""
    corners = jnp.concatenate([pred, gold], axis=1)
    (xs, widths), (ys, heights) = _grid(corners[0::2]), _grid(corners[1::2])
    in_x = [_covering(boxes[0], boxes[2], xs) for boxes in (pred, gold)]
    in_y = [_covering(boxes[1], boxes[3], ys) for boxes in (pred, gold)]

    def add_strip(areas: tuple[Array, Array], strip: tuple[Array, list[Array]]) -> tuple[tuple[Array, Array], None]:
        width, here = strip
        by_pred, by_gold = (((x[:, None] & y) != 0).any(axis=0) for x, y in zip(here, in_y))
        both = jnp.where(by_pred & by_gold, heights, 0).sum(axis=0)
        either = jnp.where(by_pred | by_gold, heights, 0).sum(axis=0)
        return (areas[0] + width * both, areas[1] + width * either), None

    nothing = jnp.zeros(pred.shape[-1])
    strips = (widths, [jnp.moveaxis(x, 1, 0) for x in in_x])
    (intersection, union), _ = lax.scan(add_strip, (nothing, nothing), strips)
    return intersection / jnp.where(union > 0, union, 1)


def _grid(ends: Int32[Array, "2 k row"]) -> tuple[Int32[Array, "cell row"], Float[Array, "cell row"]]:
    """Where the cells between neighbouring coordinates begin, and how long they are."""
    lines = jnp.sort(ends.reshape(-1, ends.shape[-1]), axis=0)
    return lines[:-1], _thousandths(jnp.diff(lines, axis=0))


def _covering(
    low: Int32[Array, "n row"], high: Int32[Array, "n row"], cells: Int32[Array, "cell row"]
) -> UInt32[Array, "word cell row"]:
    """Which boxes span each cell, one bit per box."""
    spans = (low[:, None] <= cells[None]) & (cells[None] < high[:, None])
    words = [spans[first : first + _WORD_BITS] for first in range(0, len(low), _WORD_BITS)]
    return jnp.stack(
        [
            (word * (jnp.uint32(1) << jnp.arange(len(word), dtype=jnp.uint32))[:, None, None]).sum(axis=0)
            for word in words
        ]
    )


def _thousandths(units: Int32[Array, "*shape"]) -> Float[Array, "*shape"]:
    return units.astype(jnp.float32) / UNITS_PER_THOUSANDTH
