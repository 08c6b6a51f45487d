"""HIoU of many areas at once, with masks (pure).

HIoU = (GIoU + PIoU) / 2 as in `sif_jax.sif.overlap`, which is the exact reference. Float32: areas of coordinates that
are thousandths are exact when the coordinates come in thousandths, so callers scale by 1000.
"""

from __future__ import annotations

from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float
from optax import assignment


@partial(jax.jit, static_argnames="pair_denominator")
def batched_hiou(
    pred: Float[Array, "area n 4"],
    pred_mask: Bool[Array, "area n"],
    gold: Float[Array, "area m 4"],
    gold_mask: Bool[Array, "area m"],
    *,
    pair_denominator: Literal["min", "max"] = "min",
) -> Float[Array, "area"]:
    """HIoU of each row's unmasked boxes, in [0, 1]; 1 when both sets are empty, 0 when one is."""
    return jax.vmap(partial(_hiou, pair_denominator=pair_denominator))(pred, pred_mask, gold, gold_mask)


def _hiou(
    pred: Float[Array, "n 4"],
    pred_mask: Bool[Array, "n"],
    gold: Float[Array, "m 4"],
    gold_mask: Bool[Array, "m"],
    *,
    pair_denominator: Literal["min", "max"],
) -> Float[Array, ""]:
    # A masked or inverted box becomes a point, which covers nothing and overlaps nothing.
    pred, gold = _collapse(pred, pred_mask), _collapse(gold, gold_mask)
    num_pred, num_gold = pred_mask.sum(), gold_mask.sum()
    combine = jnp.minimum if pair_denominator == "min" else jnp.maximum
    pairs = _matched_iou(pred, gold) / jnp.maximum(combine(num_pred, num_gold), 1)
    both_empty = (num_pred == 0) & (num_gold == 0)
    return jnp.where(both_empty, 1.0, (_global_iou(pred, gold) + pairs) / 2)


def _collapse(boxes: Float[Array, "n 4"], mask: Bool[Array, "n"]) -> Float[Array, "n 4"]:
    low, high = boxes[:, :2], jnp.maximum(boxes[:, :2], boxes[:, 2:])
    return jnp.where(mask[:, None], jnp.concatenate([low, high], axis=1), 0.0)


def _matched_iou(pred: Float[Array, "n 4"], gold: Float[Array, "m 4"]) -> Float[Array, ""]:
    """Total IoU of the best one-to-one matching."""
    iou = _pairwise_iou(pred, gold)
    return iou[assignment.hungarian_algorithm(-iou)].sum()


def _pairwise_iou(pred: Float[Array, "n 4"], gold: Float[Array, "m 4"]) -> Float[Array, "n m"]:
    low = jnp.maximum(pred[:, None, :2], gold[None, :, :2])
    high = jnp.minimum(pred[:, None, 2:], gold[None, :, 2:])
    intersection = jnp.maximum(high - low, 0).prod(axis=-1)
    union = _area(pred)[:, None] + _area(gold)[None, :] - intersection
    return intersection / jnp.where(union > 0, union, 1)


def _area(boxes: Float[Array, "n 4"]) -> Float[Array, "n"]:
    return (boxes[:, 2:] - boxes[:, :2]).prod(axis=1)


def _global_iou(pred: Float[Array, "n 4"], gold: Float[Array, "m 4"]) -> Float[Array, ""]:
    """IoU of the two unions, on the grid of all corner coordinates."""
    together = jnp.concatenate([pred, gold])
    xs, ys = jnp.sort(together[:, 0::2].ravel()), jnp.sort(together[:, 1::2].ravel())
    by_pred, by_gold = _covered_cells(pred, xs, ys), _covered_cells(gold, xs, ys)
    cells = jnp.diff(xs)[:, None] * jnp.diff(ys)[None, :]
    intersection, union = (cells * (by_pred & by_gold)).sum(), (cells * (by_pred | by_gold)).sum()
    return intersection / jnp.where(union > 0, union, 1)


def _covered_cells(boxes: Float[Array, "n 4"], xs: Float[Array, "x"], ys: Float[Array, "y"]) -> Bool[Array, "_ _"]:
    in_x = (boxes[:, 0, None] <= xs[None, :-1]) & (xs[None, 1:] <= boxes[:, 2, None])
    in_y = (boxes[:, 1, None] <= ys[None, :-1]) & (ys[None, 1:] <= boxes[:, 3, None])
    return (in_x[:, :, None] & in_y[:, None, :]).any(axis=0)
