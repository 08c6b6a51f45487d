"""HIoU of two sets of boxes, exactly, in float64 (host).

HIoU = (GIoU + PIoU) / 2. GIoU is the global IoU: area of the intersection of the two unions over the area of their
union. PIoU is the mean IoU over the pairs of the one-to-one matching that maximises total IoU (Kuhn-Munkres).
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from jaxtyping import Float
from scipy.optimize import linear_sum_assignment

from sif_jax.sif.boxes import Boxes, as_boxes, coverage, pairwise_iou

PairDenominator = Literal["min", "max"]


def hiou(pred_boxes: Boxes, gold_boxes: Boxes, *, pair_denominator: PairDenominator = "min") -> float:
    """Agreement of predicted and gold xyxy boxes, in any one unit; in [0, 1].

    1 when both sets are empty, 0 when one is. An inverted box covers nothing. The paper averages over the matched pairs,
    so over min(n, m), which leaves added and missing boxes unpunished; `pair_denominator="max"` counts them.

    Raises:
      ValueError: a box has not four finite numbers.
    """
    pred, gold = _without_negative_extent(as_boxes(pred_boxes)), _without_negative_extent(as_boxes(gold_boxes))
    if len(pred) == 0 or len(gold) == 0:
        return float(len(pred) == len(gold))
    return (global_iou(pred, gold) + paired_iou(pred, gold, pair_denominator)) / 2


def global_iou(pred: Float[np.ndarray, "n 4"], gold: Float[np.ndarray, "m 4"]) -> float:
    xs, ys, (by_pred, by_gold) = coverage(pred, gold)
    intersection, union = (np.diff(xs) @ cells @ np.diff(ys) for cells in (by_pred & by_gold, by_pred | by_gold))
    return float(intersection / union) if union > 0 else 0.0


def paired_iou(
    pred: Float[np.ndarray, "n 4"], gold: Float[np.ndarray, "m 4"], denominator: PairDenominator = "min"
) -> float:
    iou = pairwise_iou(pred, gold)
    matched = iou[linear_sum_assignment(iou, maximize=True)]
    return float(matched.sum() / (min if denominator == "min" else max)(iou.shape))


def _without_negative_extent(boxes: Float[np.ndarray, "n 4"]) -> Float[np.ndarray, "n 4"]:
    return np.concatenate([boxes[:, :2], np.maximum(boxes[:, :2], boxes[:, 2:])], axis=1)
