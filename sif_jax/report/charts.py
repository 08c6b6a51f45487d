"""Charts as inline SVG: a training curve, bars per family with intervals, an interval strip (host)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from sif_jax.report.curves import Curve
from sif_jax.report.markup import Markup, element, join
from sif_jax.report.stages import decimals

Interval = Mapping[str, Any]  # mean, low, high

CURVE_WIDTH, CURVE_HEIGHT = 360.0, 196.0
BARS_WIDTH, BAR, BAR_GAP, LABELS = 360.0, 10.0, 9.0, 104.0
STRIP_WIDTH, STRIP_HEIGHT = 96.0, 10.0


@dataclass(frozen=True)
class Scale:
    """A linear map from [low, high] in the data to [start, end] in pixels."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)

    def ticks(self, target: int) -> list[float]:
        """Multiples of 1, 2 or 5 times a power of ten, at most `target` + 1 of them."""
        span = (self.high - self.low) / target
        power = 10.0 ** math.floor(math.log10(span))
        step = power * next(factor for factor in (1, 2, 5, 10) if span <= factor * power * (1 + 1e-9))
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [index * step for index in range(first, last + 1)]


def padded_range(values: Float[np.ndarray, " point"]) -> tuple[float, float]:
    low, high = float(values.min()), float(values.max())
    pad = (high - low) * 0.04 or abs(high) * 0.5 or 0.5
    return low - pad, high + pad


def number_label(value: float) -> str:
    """Short: 0.25, 1.2k, 1e-4."""
    if abs(value) < 1e-12:
        return "0"
    if abs(value) < 1e-3:
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}".replace("-", "−")
    short = f"{value / 1000:.3g}k" if abs(value) >= 1000 else f"{value:.3g}"
    return short.replace("-", "−")


def curve_chart(name: str, curve: Curve, colour: str) -> Markup:
    """The raw points in light, the moving average on top, its last value written at its end."""
    smooth = curve.smoothed()
    last_step, last = float(smooth.steps[-1]), float(smooth.values[-1])
    x_range = padded_range(curve.steps) if len(curve.steps) == 1 else (float(curve.steps[0]), last_step)
    x = Scale(*x_range, 44.0, CURVE_WIDTH - 58)
    y = Scale(*padded_range(curve.values), CURVE_HEIGHT - 30, 8.0)
    return _svg(
        f"{name} by training step, last {number_label(last)}",
        (CURVE_WIDTH, CURVE_HEIGHT),
        *(_y_tick(x, y, tick) for tick in y.ticks(4)),
        *(_x_tick(x, y, tick) for tick in x.ticks(5) if tick == int(tick)),
        _line(x.start, y.start, x.end, y.start, "axis"),
        _text((x.start + x.end) / 2, CURVE_HEIGHT - 2, "training step", "unit", "middle"),
        _path(x, y, curve.thinned(), stroke=colour, stroke_width=1, opacity=0.32),
        _path(x, y, smooth.thinned(), stroke=colour, stroke_width=2),
        element("circle", cx=x(last_step), cy=y(last), r=3, fill=colour),
        _text(x(last_step) + 7, y(last) + 4, number_label(last), "value", "start"),
    )


def family_bars(
    metric: str, families: Mapping[str, Mapping[str, Interval | None]], colours: Mapping[str, str]
) -> Markup:
    """One group of bars per family, one bar per stage; the whisker is the interval. None: not measured."""
    intervals = [interval for stages in families.values() for interval in stages.values() if interval]
    low, high = min(i["low"] for i in intervals), max(i["high"] for i in intervals)
    x = Scale(min(0.0, low), max(high, 1e-3), LABELS, BARS_WIDTH - 40)
    groups, top = [], 4.0
    for family, stages in families.items():
        groups.append(_text(LABELS - 8, top + len(stages) * BAR / 2 + 4, _shortened(family), "family", "end"))
        for stage, interval in stages.items():
            groups.append(_bar(x, top, colours[stage], interval) if interval else Markup())
            top += BAR
        top += BAR_GAP
    gridlines = [_x_grid(x, tick, top) for tick in x.ticks(4)]
    return _svg(f"{metric} per family", (BARS_WIDTH, top + 18), *gridlines, *groups)


def interval_strip(interval: Interval, low: float, high: float, colour: str) -> Markup:
    """The mean as a dot and the interval as a bar on a scale that the column of the table shares."""
    x, middle = Scale(low, high, 4.0, STRIP_WIDTH - 4), STRIP_HEIGHT / 2
    return _svg(
        f"{decimals(interval['mean'])}, between {decimals(interval['low'])} and {decimals(interval['high'])}",
        (STRIP_WIDTH, STRIP_HEIGHT),
        _line(x.start, middle, x.end, middle, "grid"),
        element(
            "line", x1=x(interval["low"]), x2=x(interval["high"]), y1=middle, y2=middle, stroke=colour, stroke_width=3
        ),
        element("circle", cx=x(interval["mean"]), cy=middle, r=4, fill=colour),
        class_="strip",
    )


def _bar(x: Scale, top: float, colour: str, interval: Interval) -> Markup:
    middle = top + BAR / 2
    left, right = sorted((x(0.0), x(interval["mean"])))
    return join(
        element("rect", x=left, y=top + 0.5, width=max(right - left, 0.8), height=BAR - 1, fill=colour),
        element("line", x1=x(interval["low"]), x2=x(interval["high"]), y1=middle, y2=middle, class_="whisker"),
        _text(max(x(interval["high"]), right) + 5, middle + 3.5, decimals(interval["mean"]), "value small", "start"),
    )


def _x_grid(x: Scale, tick: float, bottom: float) -> Markup:
    line = _line(x(tick), 0.0, x(tick), bottom - 4, "axis" if abs(tick) < 1e-12 else "grid")
    return join(line, _text(x(tick), bottom + 10, number_label(tick), "tick", "middle"))


def _y_tick(x: Scale, y: Scale, tick: float) -> Markup:
    label = _text(x.start - 6, y(tick) + 4, number_label(tick), "tick", "end")
    return join(_line(x.start, y(tick), x.end, y(tick), "grid"), label)


def _x_tick(x: Scale, y: Scale, tick: float) -> Markup:
    return _text(x(tick), y.start + 14, number_label(tick), "tick", "middle")


def _path(x: Scale, y: Scale, curve: Curve, **style: str | float | int) -> Markup:
    points = " ".join(f"{x(step):.1f},{y(value):.1f}" for step, value in zip(curve.steps, curve.values))
    return element("polyline", points=points, fill="none", stroke_linejoin="round", **style)


def _line(x1: float, y1: float, x2: float, y2: float, class_: str) -> Markup:
    return element("line", x1=x1, y1=y1, x2=x2, y2=y2, class_=class_)


def _text(x: float, y: float, text: str, class_: str, anchor: str) -> Markup:
    return element("text", text, x=x, y=y, class_=class_, text_anchor=anchor)


def _shortened(name: str, limit: int = 17) -> str:
    return name if len(name) <= limit else name[: limit - 1] + "…"


def _svg(label: str, size: tuple[float, float], *children: Markup, class_: str = "chart") -> Markup:
    view = f"0 0 {size[0]:g} {size[1]:g}"
    return element("svg", *children, viewBox=view, role="img", aria_label=label, class_=class_)
