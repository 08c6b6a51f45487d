"""One question as a card: its inputs, each stage's rewards, and each stage's trace step by step (host)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from math import isnan

import numpy as np
from jaxtyping import Float

from sif_jax.report.images import Picture, read_picture
from sif_jax.report.markup import Markup, element, join
from sif_jax.report.samples import Sample
from sif_jax.report.stages import decimals, stage_label
from sif_jax.rewards.depth import depth_hits
from sif_jax.sif.boxes import Box
from sif_jax.sif.depth_codec import box_mean_depth, read_depth
from sif_jax.sif.grammar import BoxDepth, Step, Trace, parse

MAX_STEPS, MAX_BOXES, MAX_CHARACTERS = 8, 8, 6000  # a looping model must not fill the page

TERMS = {"format": "r_format", "answer": "r_ans", "bbox": "r_bbox", "depth": "r_depth", "total": "total"}


@dataclass(frozen=True)
class Canvas:
    """An image that stands once in the page and is drawn by reference."""

    id: str
    picture: Picture

    def define(self) -> Markup:
        picture = self.picture
        image = element("image", id=self.id, href=picture.address, width=picture.width, height=picture.height)
        return element("svg", element("defs", image), class_="defs", aria_hidden="true")

    def draw(self, label: str, *marks: Markup) -> Markup:
        width, height = self.picture.width, self.picture.height
        use = element("use", href=f"#{self.id}")
        return element("svg", use, *marks, viewBox=f"-4 -4 {width + 8} {height + 8}", role="img", aria_label=label)

    def boxes(self, boxes: Sequence[Box], kind: str) -> Markup:
        """Frames that stand out on any picture, numbered where there are several."""
        size = 0.05 * max(self.picture.width, self.picture.height)
        marks = []
        for number, frame in enumerate(map(self._frame, boxes), 1):
            marks += [element("rect", **frame, class_="casing"), element("rect", **frame, class_=kind)]
            if len(boxes) > 1:
                corner = {"x": frame["x"] + size / 3, "y": frame["y"] + size}
                marks.append(element("text", str(number), **corner, font_size=size, class_=f"number {kind}"))
        return join(*marks)

    def outlines(self, boxes: Sequence[Box]) -> Markup:
        return join(*(element("rect", **self._frame(box), class_="gold thin") for box in boxes))

    def _frame(self, box: Box) -> dict[str, float]:
        (x1, y1, x2, y2), width, height = box, self.picture.width, self.picture.height
        return {"x": x1 * width, "y": y1 * height, "width": (x2 - x1) * width, "height": (y2 - y1) * height}


def question_card(
    key: str,
    reason: str,
    answers: Mapping[str, Sample],
    colours: Mapping[str, str],
    traced: Collection[str] | None = None,
) -> Markup:
    """The card of one question; `answers` holds its sample per stage, `key` is unique in the page.

    Every answer has a row of scores; those in `traced`, or all, also show their trace.
    """
    question = next(iter(answers.values()))
    image = Canvas(f"{key}-image", read_picture(question.image))
    depth_norm = read_depth(question.depth_image) if question.depth_image else None
    parts = [
        element("p", element("b", reason), f" · {question.family} · {question.id}", class_="reason"),
        element("h3", question.problem),
        image.define(),
        element("div", *_inputs(key, image, question), _scores(answers, colours), class_="inputs"),
    ]
    for stage, sample in answers.items():
        if traced is None or stage in traced:
            parts.append(_stage_trace(stage_label(stage, colours), image, sample, depth_norm))
    return element("article", *parts)


def _inputs(key: str, image: Canvas, question: Sample) -> list[Markup]:
    gold = image.boxes(question.gold_boxes, "gold")
    figures = [_figure(image.draw("the image with the gold boxes", gold), "image and gold boxes")]
    if question.depth_image:
        depth = Canvas(f"{key}-depth", read_picture(question.depth_image))
        drawn = depth.draw("the depth map with the gold boxes", depth.boxes(question.gold_boxes, "gold"))
        figures.append(join(depth.define(), _figure(drawn, "depth map as the model sees it")))
    return figures


def _figure(picture: Markup, caption: str) -> Markup:
    return element("figure", picture, element("figcaption", caption))


def _scores(answers: Mapping[str, Sample], colours: Mapping[str, str]) -> Markup:
    names = ["stage", "answer", *TERMS.values(), "HIoU"]
    gold = next(iter(answers.values())).response
    rows = [_score_row(stage_label(stage, colours), sample) for stage, sample in answers.items()]
    gold_row = element(
        "tr", _cell("gold"), _cell(gold, "words"), *(_cell("") for _ in range(len(TERMS) + 1)), class_="goldrow"
    )
    head = element("thead", element("tr", *(element("th", name) for name in names)))
    return element("table", head, element("tbody", *rows, gold_row), class_="scores")


def _score_row(stage: Markup, sample: Sample) -> Markup:
    answer = parse(sample.completion).answer
    terms = [_cell(decimals(sample.scores[term]), "total" if term == "total" else "") for term in TERMS]
    hiou = f"{decimals(sample.scores['hiou_first'])} → {decimals(sample.scores['hiou_last'])}"
    return element("tr", _cell(stage), _cell(_clip(answer or "no answer", 160), "words"), *terms, _cell(hiou))


def _cell(text: str, class_: str = "") -> Markup:
    return element("td", text, class_=class_) if class_ else element("td", text)


def _stage_trace(stage: Markup, image: Canvas, sample: Sample, depth_norm: Float[np.ndarray, "h w"] | None) -> Markup:
    trace = parse(sample.completion)
    tiles = [_step(n, step, image, sample.gold_boxes, depth_norm) for n, step in enumerate(trace.steps[:MAX_STEPS], 1)]
    if len(trace.steps) > MAX_STEPS:
        tiles.append(element("p", f"and {len(trace.steps) - MAX_STEPS} more steps", class_="more"))
    head = element("h4", stage)
    steps = element("div", *tiles, _answer(sample, trace), class_="steps")
    return element("section", head, steps, _faults(sample, trace), _raw(sample, trace), class_="trace")


def _step(
    number: int, step: Step, image: Canvas, gold: Sequence[Box], depth_norm: Float[np.ndarray, "h w"] | None
) -> Markup:
    boxes = step.boxes[:MAX_BOXES]
    marks = (image.boxes([box.box_norm for box in boxes], "area"), image.outlines(gold))
    depths = [_depth_line(n if len(boxes) > 1 else None, box, depth_norm) for n, box in enumerate(boxes, 1)]
    if len(step.boxes) > MAX_BOXES:
        depths.append(element("p", f"and {len(step.boxes) - MAX_BOXES} more boxes", class_="more"))
    picture = image.draw(f"step {number}: the focused area", *marks)
    text = element("p", element("b", f"{number} "), _clip(step.text, 700))
    return element("div", picture, element("div", *depths, class_="depths"), text, class_="step")


def _depth_line(number: int | None, box: BoxDepth, depth_norm: Float[np.ndarray, "h w"] | None) -> Markup:
    name = "" if number is None else f"box {number}: "
    claimed = f"{name}depth {'unreadable' if isnan(box.depth) else f'{box.depth:.3f}'}"
    true = None if depth_norm is None else box_mean_depth(depth_norm, box.box_norm)
    if depth_norm is None or true is None:
        return element("p", claimed)
    (agrees,) = depth_hits([box], depth_norm)
    mark = element("b", "✓" if agrees else "✗")
    return element("p", f"{claimed}, true {true:.3f} ", mark, class_="agrees" if agrees else "off")


def _answer(sample: Sample, trace: Trace) -> Markup:
    return element(
        "div",
        element("p", "answer", class_="label"),
        element("p", _clip(trace.answer or "no answer", 400), class_="given"),
        element("p", "gold answer", class_="label"),
        element("p", sample.response, class_="expected"),
        element(
            "p", f"judge {decimals(sample.judge)} · total reward {decimals(sample.scores['total'])}", class_="verdict"
        ),
        class_="answer",
    )


def _faults(sample: Sample, trace: Trace) -> Markup:
    counts = Counter(violation.problem.value for violation in trace.violations)
    faults = [f"{problem}{f' (× {count})' if count > 1 else ''}" for problem, count in counts.items()]
    if sample.finish_reason == "length":
        faults.insert(0, "cut off at the token limit")
    return element("p", "Violations: ", "; ".join(faults), class_="faults") if faults else Markup()


def _raw(sample: Sample, trace: Trace) -> Markup:
    """The completion as it was sampled; open where the trace alone cannot show it."""
    opened = {} if trace.steps else {"open": "open"}
    text = element("pre", _clip(sample.completion, MAX_CHARACTERS))
    return element("details", element("summary", "completion as sampled"), text, **opened)


def _clip(text: str, limit: int) -> str:
    return text if len(text) <= limit else f"{text[:limit]} … ({len(text) - limit} more characters)"
