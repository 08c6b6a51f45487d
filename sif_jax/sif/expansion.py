"""Reverse expansion: from the gold boxes outward to the whole image, read backwards as the order of looking (host).

The paper's section on data generation. The released script sizes the first step by 1 - max(x1) - min(x2), which is not a
distance to a border; ours is the largest distance of any box to any border, divided by the steps allowed.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np

from sif_jax.sif.boxes import WHOLE_IMAGE, Box, Size, as_boxes, pairwise_iou

Area = tuple[Box, ...]

_WHOLE_AREA: Area = (WHOLE_IMAGE,)
_DISTRACTOR_EXPANSION = 1.2
_DISTRACTOR_SCALES = (0.7, 1.3)
_DISTRACTOR_MAX_IOU = 0.001
_DISTRACTOR_ATTEMPTS = 100


def reverse_expansion(
    gold_boxes: Sequence[Box],
    size: Size,
    rng: np.random.Generator,
    num_steps: int = 5,
    distractor_share: float = 0.5,
) -> list[Area]:
    """The areas in looking order: whole image, a distractor in this share of the rows, merged box, first expansion, gold.

    An area equal to the next is left out. All but the distractor contain the gold boxes; coordinates have at most three
    decimals, save those of the gold boxes.

    Raises:
      ValueError: there is no gold box.
    """
    if not gold_boxes:
        raise ValueError("reverse expansion needs at least one gold box")
    gold = tuple(gold_boxes)
    expansion = expand_once(gold, size, num_steps)
    distractors = _distractors(expansion, gold, rng) if rng.random() < distractor_share else []
    areas = [_WHOLE_AREA, *distractors, (_hull(expansion),), expansion, gold]
    return [area for area, inner in itertools.pairwise(areas) if area != inner] + [gold]


def expand_once(boxes: Area, size: Size, steps_left: int) -> Area:
    """Every box grown by the same pixels to all sides, those that then overlap merged.

    The step is such that `steps_left` of them cover the image.
    """
    corners = as_boxes(boxes)
    distances_px = np.concatenate([corners[:, :2], 1 - corners[:, 2:]], axis=1) * np.tile(size, 2)
    step_norm = distances_px.max() / steps_left / np.array(size)
    grown = np.concatenate([corners[:, :2] - step_norm, corners[:, 2:] + step_norm], axis=1)
    return _merge_overlaps([_round_outward(box) for box in grown])


def _round_outward(box: np.ndarray) -> Box:
    """Thousandths that contain the box, within the image."""
    # The tolerance keeps 0.3 * 1000 = 300.00000000000006 at 0.3.
    low = [max(math.floor(v * 1000 + 1e-6), 0) / 1000 for v in box[:2]]
    high = [min(math.ceil(v * 1000 - 1e-6), 1000) / 1000 for v in box[2:]]
    return low[0], low[1], high[0], high[1]


def _merge_overlaps(boxes: Sequence[Box]) -> Area:
    merged: list[Box] = []
    for box in boxes:
        # A merged box may overlap others, so it is compared with all of them again.
        while touching := [other for other in merged if _overlap(box, other)]:
            merged = [other for other in merged if other not in touching]
            box = _hull([box, *touching])
        merged.append(box)
    return tuple(merged)


def _overlap(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _hull(boxes: Sequence[Box]) -> Box:
    x1, y1, x2, y2 = zip(*boxes)
    return min(x1), min(y1), max(x2), max(y2)


def _distractors(expansion: Area, gold: Area, rng: np.random.Generator) -> list[Area]:
    """A box off the expansion, of about the size of one of its boxes or else of a gold box, if there is room for it."""
    likes = np.concatenate([rng.choice(as_boxes(area), _DISTRACTOR_ATTEMPTS) for area in (expansion, gold)])
    scales = _DISTRACTOR_EXPANSION * rng.uniform(*_DISTRACTOR_SCALES, (len(likes), 1))
    extents = np.minimum((likes[:, 2:] - likes[:, :2]) * scales, 1)
    corners = rng.uniform(0, 1 - extents)
    candidates = np.round(np.concatenate([corners, corners + extents], axis=1), 3)
    apart = (pairwise_iou(candidates, as_boxes([*expansion, *gold])) < _DISTRACTOR_MAX_IOU).all(axis=1)
    x1, y1, x2, y2 = candidates[np.argmax(apart)].tolist()
    return [((x1, y1, x2, y2),)] if apart.any() and x1 < x2 and y1 < y2 else []
