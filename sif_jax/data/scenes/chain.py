"""The chain of thought of a question: areas by reverse expansion, each box with its mean depth, templated words (host)."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

from sif_jax.data.scenes.config import ScenesConfig
from sif_jax.data.scenes.questions import Question
from sif_jax.sif.boxes import WHOLE_IMAGE, Box, Size
from sif_jax.sif.depth_codec import box_mean_depth
from sif_jax.sif.expansion import Area, reverse_expansion
from sif_jax.sif.grammar import BoxDepth, Step


def think(
    question: Question,
    gold_boxes: Area,
    depth_norm: Float[np.ndarray, "h w"],
    rng: np.random.Generator,
    config: ScenesConfig,
) -> tuple[Step, ...]:
    """The steps in looking order. `depth_norm` is the map as a reader decodes it, so the depths hold to three decimals."""
    h, w = depth_norm.shape
    areas = _areas(gold_boxes, (w, h), rng, config)
    return tuple(Step(_with_depths(area, depth_norm), _words(area, gold_boxes, question)) for area in areas)


def _areas(gold_boxes: Area, size: Size, rng: np.random.Generator, config: ScenesConfig) -> list[Area]:
    """Whole image first, gold boxes last; of a chain that is too long, the areas right before the gold boxes go."""
    areas = reverse_expansion(gold_boxes, size, rng, distractor_share=config.distractor_rate)
    return [*areas[:-1][: config.max_areas - 1], areas[-1]]


def _with_depths(area: Area, depth_norm: Float[np.ndarray, "h w"]) -> tuple[BoxDepth, ...]:
    means = [box_mean_depth(depth_norm, box) for box in area]
    return tuple(BoxDepth(box, round(mean, 3)) for box, mean in zip(area, means) if mean is not None)


def _words(area: Area, gold_boxes: Area, question: Question) -> str:
    if area == gold_boxes:
        words = question.finding
    elif area == (WHOLE_IMAGE,):
        words = f"I look for {question.sought}"
    elif _holds(area, gold_boxes):
        here = "This part holds" if len(area) == 1 else "These parts hold"
        words = f"{here} {question.held or question.sought}"
    else:
        words = f"No sign of {question.sought} here"
    return f"{words[0].upper()}{words[1:]}."


def _holds(area: Area, gold_boxes: Area) -> bool:
    return all(any(_contains(outer, inner) for outer in area) for inner in gold_boxes)


def _contains(outer: Box, inner: Box) -> bool:
    return outer[0] <= inner[0] and outer[1] <= inner[1] and outer[2] >= inner[2] and outer[3] >= inner[3]
