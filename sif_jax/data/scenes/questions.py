"""Questions about a scene, one function for each family; every answer follows from the scene's geometry (host).

A (colour, kind) pair occurs at most once in a scene, so "red sphere" names one solid. Comparisons are asked only where
they are clear by the margins of view.py. Gold boxes are those of the solids that decide the answer: for an existence
question answered "no" they are all solids of the colour asked for, each of which must be seen to have another shape.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import numpy as np
from jaxtyping import Float64

from sif_jax.data.scenes.solids import KINDS, PLURALS
from sif_jax.data.scenes.view import View
from sif_jax.sif import prompts

NEAR, FAR = 0.5, 0.75
MOST_GOLD = 3

T = TypeVar("T")


@dataclass(frozen=True)
class Question:
    """`gold` indexes the solids that decide the answer. The rest are words for the chain of thought: what is looked for,
    what is found in the end and what a narrowed area holds, if not what is looked for."""

    problem: str
    answer: str
    gold: tuple[int, ...]
    sought: str
    finding: str
    held: str | None = None


def ask(view: View, family: str, rng: np.random.Generator) -> Question | None:
    """A question of the family, or None where the scene gives no clear one."""
    return _ASK[family](view, rng)


def box_text(box_norm: Float64[np.ndarray, " 4"]) -> str:
    return "[" + ",".join(f"{value:.3f}" for value in box_norm) + "]"


def _position(view: View, rng: np.random.Generator) -> Question | None:
    side = (view.is_left_of, ("left of", "right of"), ("left", "right"))
    reach = (view.is_closer, ("in front of", "behind"), ("in front", "behind"))
    for relation, (forth, back), answers in _shuffled(rng, [side, reach]):
        for pair in _shuffled(rng, _pairs(view, relation))[:1]:
            swapped = int(rng.integers(2))
            gold = pair[::-1] if swapped else pair
            first, second = (_the(view, index) for index in gold)
            return Question(
                problem=f"Is {first} {forth} or {back} {second}?",
                answer=answers[swapped],
                gold=gold,
                sought=f"{first} and {second}",
                finding=f"{first} is {(forth, back)[swapped]} {second}",
            )
    return None


def _existence(view: View, rng: np.random.Generator) -> Question | None:
    """As often "no" as "yes": the question is left to scenes that offer both."""
    absence = _absence(view, rng)
    if absence is None or rng.integers(2):
        return absence
    index = int(rng.integers(len(view.solids)))
    name = _a(view.solids[index].name)
    return Question(
        problem=f"Is there {name}?",
        answer="yes",
        gold=(index,),
        sought=name,
        finding=f"{name} is here, {_reach(view, index)}",
    )


def _absence(view: View, rng: np.random.Generator) -> Question | None:
    """Asks for a colour and a kind that are both there, but not together: neither alone gives the answer."""
    names = {(solid.colour, solid.kind) for solid in view.solids}
    pairs = {(colour, kind) for colour, _ in names for _, kind in names}
    groups = view.groups(most=MOST_GOLD)
    for colour, kind in _shuffled(rng, sorted(pairs - names)):
        if f"{colour} objects" in groups:
            gold = groups[f"{colour} objects"]
            return Question(
                problem=f"Is there {_a(f'{colour} {kind}')}?",
                answer="no",
                gold=gold,
                sought=_a(f"{colour} {kind}"),
                held=f"all {colour} objects",
                finding=f"{colour} is only {_list([_a(view.solids[index].kind) for index in gold])}",
            )
    return None


def _counting(view: View, rng: np.random.Generator) -> Question | None:
    groups = view.groups(most=MOST_GOLD)
    count = rng.choice(sorted({len(gold) for gold in groups.values()}))
    group, gold = _shuffled(rng, [item for item in groups.items() if len(item[1]) == count])[0]
    return Question(
        problem=f"How many {group} are there?",
        answer=str(count),
        gold=gold,
        sought=group,
        held=f"all {group}",
        finding=f"I count {count}: {_list([view.solids[index].name for index in gold])}",
    )


def _size(view: View, rng: np.random.Generator) -> Question | None:
    for large, small in _shuffled(rng, _pairs(view, view.is_larger))[:1]:
        finding = f"{_the(view, large)} is large, {_the(view, small)} small"
        if rng.integers(2):
            return _choice(view, rng, "Which is larger?", large, small, finding)
        right = bool(rng.integers(2))
        gold = (large, small) if right else (small, large)
        first, second = (_the(view, index) for index in gold)
        return Question(
            problem=f"Is {first} larger than {second}?",
            answer="yes" if right else "no",
            gold=gold,
            sought=f"{first} and {second}",
            finding=finding,
        )
    return None


def _depth_order(view: View, rng: np.random.Generator) -> Question | None:
    for near, far in _shuffled(rng, _pairs(view, view.is_closer))[:1]:
        return _choice(view, rng, "Which is closer to the camera?", near, far, f"{_the(view, near)} is closer")
    return None


def _distance(view: View, rng: np.random.Generator) -> Question | None:
    for anchor in _shuffled(rng, range(len(view.solids))):
        for near, far in _shuffled(rng, _pairs(view, partial(view.is_nearer_to, anchor)))[:1]:
            name = _the(view, anchor)
            finding = f"{_the(view, near)} is nearer to {name}"
            return _choice(view, rng, f"Which is nearer to {name}?", near, far, finding, anchor=(anchor,))
    return None


def _attribute(view: View, rng: np.random.Generator) -> Question | None:
    unique = view.groups(most=1)
    shapes = [
        (f"What shape is the {solid.colour} object?", solid.kind, index, f"the {solid.colour} object", _a(solid.kind))
        for index, solid in enumerate(view.solids)
        if f"{solid.colour} objects" in unique
    ]
    colours = [
        (f"What colour is the {solid.kind}?", solid.colour, index, f"the {solid.kind}", solid.colour)
        for index, solid in enumerate(view.solids)
        if PLURALS[solid.kind] in unique
    ]
    for kind in _shuffled(rng, [shapes, colours]):
        for problem, answer, index, noun, predicate in _shuffled(rng, kind)[:1]:
            finding = f"{noun} is {predicate}, {_reach(view, index)}"
            return Question(problem=problem, answer=answer, gold=(index,), sought=noun, finding=finding)
    return None


def _referring(view: View, rng: np.random.Generator) -> Question | None:
    plain = [(_the(view, index), index) for index in range(len(view.solids))]
    query, index = _shuffled(rng, _shuffled(rng, [plain, _superlatives(view) or plain])[0])[0]
    return Question(
        problem=prompts.rec_question(query),
        answer=box_text(view.boxes_norm[index]),
        gold=(index,),
        sought=query,
        finding=f"this is {query}, {_reach(view, index)}",
    )


def _grounding(view: View, rng: np.random.Generator) -> Question | None:
    several = [
        ([view.solids[gold[0]].kind], gold)
        for group, gold in view.groups(most=MOST_GOLD).items()
        if len(gold) > 1 and not group.endswith(" objects")
    ]
    pairs = [([view.solids[i].name, view.solids[j].name], (i, j)) for i, j in _pairs(view, lambda i, j: True)]
    targets, gold = _shuffled(rng, _shuffled(rng, [pairs, several or pairs])[0])[0]
    named = [view.solids[index].name for index in gold]
    return Question(
        problem=prompts.ovd_question(targets),
        answer="[" + ",".join(box_text(view.boxes_norm[index]) for index in gold) + "]",
        gold=gold,
        sought=_list([f"every {target}" if len(targets) == 1 else f"the {target}" for target in targets]),
        finding=f"found {_list(named)}",
    )


def _superlatives(view: View) -> list[tuple[str, int]]:
    """Phrases that single out one solid by where it is among its like, or among all."""
    groups = {group: gold for group, gold in view.groups(most=len(view.solids)).items() if len(gold) > 1}
    sides = [("leftmost", view.is_left_of), ("rightmost", lambda i, j: view.is_left_of(j, i))]
    reaches = [("nearest", view.is_closer), ("farthest", lambda i, j: view.is_closer(j, i))]
    return [
        (f"the {word} {kind}", index)
        for kind in KINDS
        for word, relation in sides + reaches
        for index in groups.get(PLURALS[kind], ())
        if all(relation(index, other) for other in groups[PLURALS[kind]] if other != index)
    ]


def _choice(
    view: View,
    rng: np.random.Generator,
    question: str,
    right: int,
    wrong: int,
    finding: str,
    anchor: tuple[int, ...] = (),
) -> Question:
    """A question between two solids, the right one as often A as B."""
    letter = "AB"[rng.integers(2)]
    options = (right, wrong) if letter == "A" else (wrong, right)
    first, second = (_the(view, index) for index in options)
    return Question(
        problem=f"{question} A. {first} B. {second}",
        answer=letter,
        gold=(*anchor, *options),
        sought=_list([_the(view, index) for index in (*anchor, *options)]),
        finding=f"{finding}: {letter}",
    )


def _pairs(view: View, relation: Callable[[int, int], bool]) -> list[tuple[int, int]]:
    return [pair for pair in itertools.permutations(range(len(view.solids)), 2) if relation(*pair)]


def _shuffled(rng: np.random.Generator, items: Iterable[T]) -> list[T]:
    items = list(items)
    return [items[index] for index in rng.permutation(len(items))]


def _the(view: View, index: int) -> str:
    return f"the {view.solids[index].name}"


def _a(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def _list(words: Sequence[str]) -> str:
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def _reach(view: View, index: int) -> str:
    depth = view.depths_norm[index]
    return "near" if depth < NEAR else "far" if depth > FAR else "midway"


_ASK: dict[str, Callable[[View, np.random.Generator], Question | None]] = {
    "position": _position,
    "existence": _existence,
    "counting": _counting,
    "size": _size,
    "depth_order": _depth_order,
    "distance": _distance,
    "attribute": _attribute,
    "referring": _referring,
    "grounding": _grounding,
}
