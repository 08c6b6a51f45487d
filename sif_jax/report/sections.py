"""The sections of a report: facts, results, training curves, families, traces (host)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sif_jax.report.charts import curve_chart, family_bars, interval_strip
from sif_jax.report.curves import Curve
from sif_jax.report.markup import Markup, element
from sif_jax.report.samples import Attempt, Sample, choose_groups
from sif_jax.report.stages import GAIN, LOSS, NEUTRAL, decimals, metric_label, signed, stage_label
from sif_jax.report.traces import question_card

# Names and units of the curves that are shown first; any other key of a metrics file follows, folded.
CURVES = {
    "loss": ("loss", "nats per token"),
    "token_accuracy": ("token accuracy", "fraction"),
    "grad_norm": ("gradient norm", ""),
    "learning_rate": ("learning rate", ""),
    "tokens_per_second": ("throughput", "tokens per second"),
    "reward/total": ("total reward", "batch mean"),
    "reward/format": ("format reward", "batch mean"),
    "reward/answer": ("answer reward", "batch mean"),
    "reward/bbox": ("box reward", "batch mean"),
    "reward/depth": ("depth reward", "batch mean"),
    "spread/total": ("spread of the reward", "deviation within groups"),
    "hiou_last": ("HIoU of the last area", "batch mean"),
    "groups_without_signal": ("groups without signal", "fraction"),
    "masked": ("completions not judged", "fraction"),
    "kl": ("KL to the reference", "nats per token"),
    "entropy": ("policy entropy", "nats per token"),
    "clip_fraction": ("clipped tokens", "fraction"),
    "sampler_gap": ("sampler against trainer", "nats per token"),
    "completion_length": ("completion length", "tokens"),
    "truncated": ("truncated completions", "fraction"),
}

LEGEND = element(
    "p",
    element("span", element("i", class_="key area-key"), "area that the model looks at"),
    element("span", element("i", class_="key gold-key"), "gold box"),
    element("span", "depth: 0 is near, 1 is far; true is the mean of the depth map inside the box; ✓ within 10 %"),
    class_="legend",
)

Summary = Mapping[str, Any]
Colours = Mapping[str, str]


def header(title: str, facts: Mapping[str, str]) -> Markup:
    items = (element("div", element("dt", name), element("dd", value)) for name, value in facts.items())
    return element("header", element("h1", title), element("dl", *items, class_="facts"))


def results(summaries: Mapping[str, Summary], colours: Colours) -> Markup:
    """The table of stages by metrics: mean, interval, and the interval drawn on the scale of its column."""
    metrics = _metrics(summaries)
    ranges = {metric: _range([summary["metrics"].get(metric) for summary in summaries.values()]) for metric in metrics}
    head = element("tr", element("th", "stage"), *(element("th", metric_label(metric)) for metric in metrics))
    rows = []
    for stage, summary in summaries.items():
        count = element("span", f"{summary['questions']} questions, {summary['scenes']} scenes", class_="count")
        cells = [_result(summary["metrics"].get(metric), *ranges[metric], colours[stage]) for metric in metrics]
        rows.append(element("tr", element("td", stage_label(stage, colours), count), *cells))
    table = element("table", element("thead", head), element("tbody", *rows), class_="results")
    note = (
        "Mean over held-out questions, with its 95 % percentile-bootstrap interval; the bootstrap draws whole scenes. "
        "The strips of a column share one scale. The best mean of a column is bold."
    )
    return _section("Results", note, element("div", table, class_="scroll"))


def families(summaries: Mapping[str, Summary], colours: Colours) -> Markup:
    names = sorted({family for summary in summaries.values() for family in summary["families"]})
    panels = []
    for metric in _metrics(summaries):
        bars = {
            family: {stage: _interval(summary, family, metric) for stage, summary in summaries.items()}
            for family in names
        }
        label = metric_label(metric)
        panels.append(element("figure", element("figcaption", label), family_bars(label, bars, colours)))
    legend = element("p", *(element("span", stage_label(stage, colours)) for stage in summaries), class_="legend")
    note = "Mean of each family of questions; whiskers are 95 % bootstrap intervals over scenes."
    return _section("By family", note, legend, element("div", *panels, class_="charts"))


def training(stage: str, curves: Mapping[str, Curve], colour: str) -> Markup:
    shown = [_curve(*CURVES[key], curves[key], colour) for key in CURVES if key in curves]
    others = [_curve(key, "", curve, colour) for key, curve in curves.items() if key not in CURVES]
    note = "Light: every logged step. Dark: centred moving average over a twentieth of the run, with its last value."
    folded = element("details", element("summary", "other metrics"), element("div", *others, class_="charts"))
    return _section(f"Training: {stage}", note, element("div", *shown, class_="charts"), folded if others else "")


def traces(
    heading: str, key: str, chosen: Mapping[str, str], samples: Mapping[str, Mapping[str, Sample]], colours: Colours
) -> Markup:
    """Cards of the chosen questions (why it is shown, by id), with the samples of every stage by stage and id."""
    cards = []
    for number, (question, reason) in enumerate(chosen.items()):
        answers = {stage: by_id[question] for stage, by_id in samples.items() if question in by_id}
        cards.append(question_card(f"{key}-{number}", reason, answers, colours))
    note = (
        "Each trace reads from left to right: where the model looks and what it says there. "
        "HIoU: of the first area that is not the whole image → of the last area."
    )
    return _section(heading, note, LEGEND, *cards)


def rollouts(stage: str, key: str, steps: Mapping[int, Sequence[Sequence[Attempt]]]) -> Markup:
    """Groups of completions at a few steps of a training: every reward of the group, its best and its worst trace."""
    parts: list[Markup] = []
    for step, groups in steps.items():
        parts.append(element("h3", f"step {step}"))
        for number, (reason, group) in enumerate(choose_groups(groups).items()):
            parts.append(_group_card(f"{key}-{step}-{number}", reason, group))
    note = (
        "What the policy sampled for one prompt, highest reward first. Completions above the mean of their group are "
        "reinforced (blue), those below it are weakened (orange). The traces are those of the highest and the lowest reward."
    )
    return _section(f"Completions while training: {stage}", note, LEGEND, *parts)


def _group_card(key: str, reason: str, group: Sequence[Attempt]) -> Markup:
    answers = {f"{a.sample + 1}, advantage {signed(a.advantage)}": a for a in group}
    colours = {label: GAIN if a.advantage > 0 else LOSS if a.advantage < 0 else NEUTRAL for label, a in answers.items()}
    judged = [label for label, a in answers.items() if a.scores["total"] is not None]
    return question_card(key, reason, answers, colours, traced={*judged[:1], *judged[-1:]})


def _section(heading: str, note: str, *children: str) -> Markup:
    return element("section", element("h2", heading), element("p", note, class_="note"), *children)


def _metrics(summaries: Mapping[str, Summary]) -> list[str]:
    return list(dict.fromkeys(metric for summary in summaries.values() for metric in summary["metrics"]))


def _interval(summary: Summary, family: str, metric: str) -> Mapping[str, Any] | None:
    return summary["families"].get(family, {}).get(metric)


def _range(intervals: list[Mapping[str, Any] | None]) -> tuple[float, float, float]:
    """Lowest low (or 0), highest high and best mean of a column."""
    known = [interval for interval in intervals if interval]
    high = max(interval["high"] for interval in known)
    return min(0.0, *(i["low"] for i in known)), max(high, 1e-3), max(i["mean"] for i in known)


def _result(interval: Mapping[str, Any] | None, low: float, high: float, best: float, colour: str) -> Markup:
    if interval is None:
        return element("td", "–")
    mean = element("span", decimals(interval["mean"]), class_="mean best" if interval["mean"] == best else "mean")
    bounds = element("span", f"[{decimals(interval['low'])}, {decimals(interval['high'])}]", class_="interval")
    return element("td", mean, bounds, interval_strip(interval, low, high, colour))


def _curve(name: str, unit: str, curve: Curve, colour: str) -> Markup:
    caption = element("figcaption", name, element("span", f", {unit}" if unit else ""))
    return element("figure", caption, curve_chart(name, curve, colour))
