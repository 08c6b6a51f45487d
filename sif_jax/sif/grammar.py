"""The grammar of a trace: parsed in linear time to steps, answer and typed violations, and rendered (host).

    trace := <think> (<area> JSON </area> <text> … </text>)+ </think> <answer> … </answer>
    JSON  := [{"bbox_2d": [x1, y1, x2, y2], "depth": d}, …]      numbers in [0, 1], at most three decimals

Only whitespace may stand between tags. What can be read is read, also from a trace with violations.
"""

from __future__ import annotations

import dataclasses
import enum
import itertools
import json
import math
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from sif_jax.sif.boxes import Box

MAX_CHARS = 200_000
MAX_TAGS = 256
MAX_AREA_CHARS = 20_000
_MAX_NESTING = 4
_DECIMALS = 3


@dataclasses.dataclass(frozen=True)
class BoxDepth:
    """A box and the depth the model gives it; NaN when the depth cannot be read, which is always a violation."""

    box_norm: Box
    depth: float


@dataclasses.dataclass(frozen=True)
class Step:
    boxes: tuple[BoxDepth, ...]
    text: str


class Problem(enum.Enum):
    TOO_LONG = "the trace or an area is too long, or the trace has too many tags"
    MISSING_TAG = "the trace ends too early"
    UNEXPECTED_TAG = "a tag stands where another must"
    UNCLOSED_TAG = "a tag is not closed"
    NESTED_TAG = "a tag is opened inside an area, a text or the answer"
    OUTSIDE_TEXT = "there is text outside the tags"
    EMPTY_TEXT = "a text is empty"
    EMPTY_ANSWER = "the answer is empty"
    AREA_NOT_JSON = "an area is not JSON"
    AREA_NOT_LIST = "an area is not a list"
    EMPTY_AREA = "an area has no box"
    ITEM_NOT_OBJECT = "an item of an area is not an object"
    MISSING_KEY = "an item lacks bbox_2d or depth"
    EXTRA_KEY = "an item has another or a repeated key"
    BOX_NOT_FOUR_NUMBERS = "a box is not four finite numbers"
    BOX_OUTSIDE = "a coordinate is outside [0, 1]"
    BOX_INVERTED = "a box has x2 <= x1 or y2 <= y1"
    DEPTH_NOT_NUMBER = "a depth is not a finite number"
    DEPTH_IS_BOOLEAN = "a depth is true or false"
    DEPTH_OUTSIDE = "a depth is outside [0, 1]"
    TOO_MANY_DECIMALS = "a number has more than three decimals or an exponent"


class Violation(NamedTuple):
    """A problem and the character it is found at; for the contents of an area, once and at the area's first character."""

    problem: Problem
    position: int


@dataclasses.dataclass(frozen=True)
class Trace:
    steps: tuple[Step, ...]
    answer: str | None
    violations: tuple[Violation, ...]

    @property
    def well_formed(self) -> bool:
        return not self.violations

    @property
    def areas(self) -> tuple[tuple[BoxDepth, ...], ...]:
        """The areas in which at least one box can be read."""
        return tuple(step.boxes for step in self.steps if step.boxes)

    @property
    def texts(self) -> tuple[str, ...]:
        return tuple(step.text for step in self.steps if step.text)


def parse(text: str) -> Trace:
    """The trace in any string; never raises.

    A box is read when it is four finite numbers in [0, 1] that are not inverted. The first answer counts; an answer
    that the end of the text cuts off is read and is a violation. Nothing is read beyond `MAX_CHARS` characters or
    `MAX_TAGS` tags, nor in an area of more than `MAX_AREA_CHARS`, so that hostile text costs milliseconds.
    """
    tags = list(itertools.islice(_tags(text[:MAX_CHARS]), MAX_TAGS + 1))
    end = tags.pop().start if len(tags) > MAX_TAGS else min(len(text), MAX_CHARS)
    violations = [Violation(Problem.TOO_LONG, end)] if end < len(text) else []
    text = text[:end]
    boundaries = [_START, *tags, _Tag(_END, end, end)]
    steps: list[Step] = []
    answer = None
    for tag, following in itertools.pairwise(boundaries):
        body = text[tag.end : following.start].strip()
        violations += _structure_violations(tag, following, text)
        match tag.name:
            case "<area>":
                boxes, problems = _read_area(text[tag.end : following.start])
                violations += [Violation(problem, tag.end) for problem in dict.fromkeys(problems)]
                steps.append(Step(boxes, ""))
            case "<text>" if steps and not steps[-1].text:
                steps[-1] = dataclasses.replace(steps[-1], text=body)
            case "<text>":
                steps.append(Step((), body))
            case "<answer>" if answer is None:
                answer = body or None
    return Trace(tuple(steps), answer, tuple(violations))


def render(steps: Sequence[Step], answer: str) -> str:
    """The canonical text: three decimals, no spaces. A box thinner than a thousandth is widened to one."""
    areas = (",".join(_render_item(item) for item in step.boxes) for step in steps)
    think = "".join(f"<area>[{area}]</area><text>{step.text}</text>" for area, step in zip(areas, steps))
    return f"<think>{think}</think><answer>{answer}</answer>"


def _render_item(item: BoxDepth) -> str:
    x1, y1, x2, y2 = item.box_norm
    (x1, x2), (y1, y2) = _thousandths(x1, x2), _thousandths(y1, y2)
    return f'{{"bbox_2d":[{x1:.3f},{y1:.3f},{x2:.3f},{y2:.3f}],"depth":{item.depth:.3f}}}'


def _thousandths(low: float, high: float) -> tuple[float, float]:
    low, high = round(low, _DECIMALS), round(high, _DECIMALS)
    if low < high:
        return low, high
    return (low, low + 0.001) if low < 1 else (0.999, 1.0)


class _Tag(NamedTuple):
    name: str
    start: int
    end: int


_BEGIN, _END = "begin", "end"
_START = _Tag(_BEGIN, 0, 0)
_FOLLOWERS = {
    _BEGIN: ("<think>",),
    "<think>": ("<area>",),
    "<area>": ("</area>",),
    "</area>": ("<text>",),
    "<text>": ("</text>",),
    "</text>": ("<area>", "</think>"),
    "</think>": ("<answer>",),
    "<answer>": ("</answer>",),
    "</answer>": (_END,),
}
_TAG = re.compile("|".join(name for name in _FOLLOWERS if name != _BEGIN))
_EMPTY_BODY = {"<text>": Problem.EMPTY_TEXT, "<answer>": Problem.EMPTY_ANSWER}
_WITH_BODY = ("<area>", *_EMPTY_BODY)


def _tags(text: str) -> Iterator[_Tag]:
    for match in _TAG.finditer(text):
        yield _Tag(match[0], match.start(), match.end())


def _structure_violations(tag: _Tag, following: _Tag, text: str) -> Iterator[Violation]:
    expected = following.name in _FOLLOWERS[tag.name]
    gap = text[tag.end : following.start]
    has_text = bool(gap.strip())
    if not expected:
        yield Violation(_misplacement(tag, following), tag.start if tag.name in _WITH_BODY else following.start)
    if tag.name not in _WITH_BODY and has_text:
        yield Violation(Problem.OUTSIDE_TEXT, tag.end + len(gap) - len(gap.lstrip()))
    if tag.name in _EMPTY_BODY and not has_text:
        yield Violation(_EMPTY_BODY[tag.name], tag.end)


def _misplacement(tag: _Tag, following: _Tag) -> Problem:
    if tag.name in _WITH_BODY:
        opens = following.name != _END and not following.name.startswith("</")
        return Problem.NESTED_TAG if opens else Problem.UNCLOSED_TAG
    return Problem.MISSING_TAG if following.name == _END else Problem.UNEXPECTED_TAG


class _Literal(str):
    """A JSON number as it was written."""


_PLAIN = re.compile(r"-?\d+(?:\.\d{1,3})?")
# Objects become tuples of pairs, which keeps repeated keys and tells them from lists.
_JSON = json.JSONDecoder(parse_float=_Literal, parse_int=_Literal, parse_constant=_Literal, object_pairs_hook=tuple)
_STRING = re.compile(r'"(?:[^"\\]++|\\.)*+"?')
_BRACKET = re.compile(r"[\[\]{}]")


def _read_area(body: str) -> tuple[tuple[BoxDepth, ...], list[Problem]]:
    if len(body) > MAX_AREA_CHARS:
        return (), [Problem.TOO_LONG]
    if _is_nested_deeply(body):
        return (), [Problem.AREA_NOT_JSON]
    try:
        area = _JSON.decode(body)
    except ValueError:
        return (), [Problem.AREA_NOT_JSON]
    if not isinstance(area, list):
        return (), [Problem.AREA_NOT_LIST]
    if not area:
        return (), [Problem.EMPTY_AREA]
    problems: list[Problem] = []
    boxes = [_read_item(item, problems) for item in area]
    return tuple(box for box in boxes if box is not None), problems


def _is_nested_deeply(body: str) -> bool:
    """Whether brackets, those inside strings left out, are nested deeper than any item of an area is."""
    depth = 0
    for bracket in _BRACKET.findall(_STRING.sub("", body)):
        depth += 1 if bracket in "[{" else -1
        if depth > _MAX_NESTING:
            return True
    return False


def _read_item(item: Any, problems: list[Problem]) -> BoxDepth | None:
    if not isinstance(item, tuple):
        problems.append(Problem.ITEM_NOT_OBJECT)
        return None
    values = dict(item)
    known = ("bbox_2d" in values) + ("depth" in values)
    if known < 2:
        problems.append(Problem.MISSING_KEY)
    if known < len(item):
        problems.append(Problem.EXTRA_KEY)
    depth = _read_depth(values["depth"], problems) if "depth" in values else math.nan
    box = _read_box(values["bbox_2d"], problems) if "bbox_2d" in values else None
    return None if box is None else BoxDepth(box, depth)


def _read_depth(value: Any, problems: list[Problem]) -> float:
    if isinstance(value, bool):
        problems.append(Problem.DEPTH_IS_BOOLEAN)
        return math.nan
    depth = _to_float(value)
    if not math.isfinite(depth):
        problems.append(Problem.DEPTH_NOT_NUMBER)
        return math.nan
    if not 0 <= depth <= 1:
        problems.append(Problem.DEPTH_OUTSIDE)
    if not _PLAIN.fullmatch(value):
        problems.append(Problem.TOO_MANY_DECIMALS)
    return depth


def _read_box(value: Any, problems: list[Problem]) -> Box | None:
    numbers = [_to_float(item) for item in value] if isinstance(value, list) and len(value) == 4 else [math.nan]
    if not all(map(math.isfinite, numbers)):
        problems.append(Problem.BOX_NOT_FOUR_NUMBERS)
        return None
    x1, y1, x2, y2 = numbers
    if not all(map(_PLAIN.fullmatch, value)):
        problems.append(Problem.TOO_MANY_DECIMALS)
    if min(numbers) < 0 or max(numbers) > 1:
        problems.append(Problem.BOX_OUTSIDE)
        return None
    if x2 <= x1 or y2 <= y1:
        problems.append(Problem.BOX_INVERTED)
        return None
    return x1, y1, x2, y2


def _to_float(value: Any) -> float:
    return float(value) if isinstance(value, _Literal) else math.nan
