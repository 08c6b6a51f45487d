"""A policy with some skill, and tricks by which it could earn more without solving more (host).

The honest policy looks at the whole image, then around what it means, then at it. Its boxes are off by a tenth of their
size, its depths by 6 %, and six of ten answers are known; the others it guesses.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import numpy as np
from jaxtyping import Float

from sif_jax.sif.boxes import WHOLE_IMAGE, Box
from sif_jax.sif.depth_codec import box_mean_depth
from sif_jax.sif.grammar import BoxDepth, Step, render
from sif_jax.sif.overlap import hiou
from sif_jax.sif.record import Record

_BOX_ERROR = 0.1
_DEPTH_ERROR = 0.06
_KNOWN_SHARE = 0.6
_LOOK_AROUND = 1.6
_MIN_SIDE = 0.02

Area = tuple[BoxDepth, ...]
DepthMap = Float[np.ndarray, "h w"]


@dataclasses.dataclass(frozen=True)
class Question:
    """A record with its depth map, and every answer that one could think of; the gold one is among them."""

    record: Record
    depth_norm: DepthMap
    candidates: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Draft:
    """What the honest policy would write."""

    question: Question
    areas: tuple[Area, ...]
    answer: str
    is_sure: bool  # of the answer
    rng: np.random.Generator

    def text(self) -> str:
        return render([Step(area, "Look here.") for area in self.areas], self.answer)

    def pair(self, box: Box, error: float = _DEPTH_ERROR) -> BoxDepth:
        """A box with its depth as the policy reads it."""
        depth = (box_mean_depth(self.question.depth_norm, box) or 0.0) * (1 + error * self.rng.standard_normal())
        return BoxDepth(box, float(np.clip(depth, 0, 1)))

    def with_last(self, *area: BoxDepth) -> str:
        return self.with_areas(*self.areas[:-1], area)

    def with_areas(self, *areas: Area) -> str:
        return dataclasses.replace(self, areas=areas).text()

    def with_answer(self, answer: str) -> str:
        return dataclasses.replace(self, answer=answer).text()

    def with_depths(self, depth: float) -> str:
        return self.with_areas(*(tuple(BoxDepth(pair.box_norm, depth) for pair in area) for area in self.areas))


Trick = Callable[[Draft], str]


def draft_honestly(question: Question, rng: np.random.Generator) -> Draft:
    record = question.record
    is_sure = bool(rng.random() < _KNOWN_SHARE)
    answer = record.response if is_sure else str(rng.choice(question.candidates))
    draft = Draft(question, (), answer, is_sure, rng)
    meant = [_misplaced(box, rng) for box in record.gold_boxes]
    looks = ([WHOLE_IMAGE], [_scaled(box, _LOOK_AROUND) for box in meant], meant)
    return dataclasses.replace(draft, areas=tuple(tuple(draft.pair(box) for box in look) for look in looks))


def _misplaced(box: Box, rng: np.random.Generator) -> Box:
    x1, y1, x2, y2 = box
    sides = np.array([x2 - x1, y2 - y1, x2 - x1, y2 - y1])
    return _inside(np.array(box) + _BOX_ERROR * sides * rng.standard_normal(4))


def _scaled(box: Box, factor: float) -> Box:
    centre, half = np.array([box[0] + box[2], box[1] + box[3]]) / 2, np.array([box[2] - box[0], box[3] - box[1]]) / 2
    return _inside(np.concatenate([centre - factor * half, centre + factor * half]))


def _inside(corners: Float[np.ndarray, " 4"]) -> Box:
    low = np.clip(np.minimum(corners[:2], corners[2:]), 0, 1 - _MIN_SIDE)
    high = np.clip(np.maximum(corners[:2], corners[2:]), low + _MIN_SIDE, 1)
    x1, y1, x2, y2 = np.round(np.concatenate([low, high]), 3).tolist()
    return x1, y1, x2, y2


def _emptiest_corner(draft: Draft) -> Box:
    corners: list[Box] = [
        (0.0, 0.0, 0.05, 0.05),
        (0.95, 0.0, 1.0, 0.05),
        (0.0, 0.95, 0.05, 1.0),
        (0.95, 0.95, 1.0, 1.0),
    ]
    return min(corners, key=lambda corner: hiou([corner], draft.question.record.gold_boxes))


def _with_added(draft: Draft, *boxes: Box) -> str:
    return draft.with_last(*draft.areas[-1], *(draft.pair(box, error=0.0) for box in boxes))


def _tiled(draft: Draft, side: int = 5) -> str:
    cuts: Sequence[float] = np.linspace(0, 1, side + 1).round(3).tolist()
    strips = list(itertools.pairwise(cuts))
    return draft.with_last(*(draft.pair((x1, y1, x2, y2)) for x1, x2 in strips for y1, y2 in strips))


def _surest_alone(draft: Draft) -> str:
    """Only the box that fits best."""
    gold = draft.question.record.gold_boxes
    return draft.with_last(max(draft.areas[-1], key=lambda pair: hiou([pair.box_norm], gold)))


def _tiny(draft: Draft) -> str:
    return draft.with_last(*(draft.pair(_scaled(pair.box_norm, 0.0)) for pair in draft.areas[-1]))


def _empty_look_first(draft: Draft) -> str:
    whole, _, last = draft.areas
    return draft.with_areas(whole, (draft.pair(_emptiest_corner(draft)),), last)


def _one_easy_depth(draft: Draft) -> str:
    """A single box far away whose depth is known, and nothing else."""
    return draft.with_areas((draft.pair(_emptiest_corner(draft), error=0.0),))


def _known_elsewhere(draft: Draft) -> str:
    return _with_added(draft, _emptiest_corner(draft))


def _one_step(draft: Draft) -> str:
    """Fewer pairs, fewer depths that can be wrong."""
    return draft.with_areas(draft.areas[-1])


def _inside_text(draft: Draft, old: str, new: str) -> str:
    return draft.text().replace(old, new, 1)


def _listed(draft: Draft, separator: str) -> str:
    return draft.text() if draft.is_sure else draft.with_answer(separator.join(draft.question.candidates))


def _answered_twice(draft: Draft) -> str:
    return draft.text() + "".join(f"<answer>{candidate}</answer>" for candidate in draft.question.candidates)


SPECKS: tuple[Box, ...] = ((0.0, 0.0, 0.001, 0.001), (0.999, 0.999, 1.0, 1.0))

TRICKS: Mapping[str, Mapping[str, Trick]] = {
    "boxes": {
        "two specks added": lambda draft: _with_added(draft, *SPECKS),
        "one box added far away": _known_elsewhere,
        "whole image added": lambda draft: _with_added(draft, WHOLE_IMAGE),
        "every box twice": lambda draft: draft.with_last(*draft.areas[-1], *draft.areas[-1]),
        "only the surest box": _surest_alone,
        "whole image last": lambda draft: draft.with_last(draft.pair(WHOLE_IMAGE)),
        "whole image only": lambda draft: draft.with_areas(draft.areas[0]),
        "tiny boxes": _tiny,
        "the image in 25 tiles": _tiled,
    },
    "progress": {
        "an empty corner first": _empty_look_first,
    },
    "depth": {
        "one depth everywhere": lambda draft: draft.with_depths(draft.areas[0][0].depth),
        "depth 0.5 everywhere": lambda draft: draft.with_depths(0.5),
        "one step only": _one_step,
        "one easy box far away": _one_easy_depth,
    },
    "format": {
        "text before the trace": lambda draft: "Sure! " + draft.text(),
        "text after the trace": lambda draft: draft.text() + " I am certain.",
        "an empty area added": partial(_inside_text, old="</think>", new="<area>[]</area><text>More.</text></think>"),
        "two think blocks": lambda draft: draft.text().partition("<answer>")[0] + draft.text(),
        "depth true": lambda draft: draft.with_depths(1.0).replace('"depth":1.000', '"depth":true'),
        "an answer in the text": partial(_inside_text, old="Look here.", new="<answer>Look here.</answer>"),
    },
    "answer": {
        "every answer in a list, when unsure": partial(_listed, separator=", "),
        "every answer with or, when unsure": partial(_listed, separator=" or "),
        "every answer in its own tags": _answered_twice,
        "no answer": lambda draft: draft.text().partition("<answer>")[0],
    },
}
