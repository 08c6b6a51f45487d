"""Training curves: one per numeric key of a metrics file, with their smoothing (host)."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float

from sif_jax.errors import InputError

MAX_POINTS = 500


@dataclass(frozen=True)
class Curve:
    steps: Float[np.ndarray, " point"]
    values: Float[np.ndarray, " point"]

    @property
    def window(self) -> int:
        """Points that the smoothed curve averages: an odd number near a twentieth of the curve."""
        return 2 * (len(self.values) // 40) + 1

    def smoothed(self) -> Curve:
        """The centred moving average, over the points that exist near the ends."""
        kernel = np.ones(self.window)
        total = np.convolve(self.values, kernel, "same")
        return Curve(self.steps, total / np.convolve(np.ones_like(self.values), kernel, "same"))

    def thinned(self) -> Curve:
        keep = np.unique(np.linspace(0, len(self.steps) - 1, MAX_POINTS).round().astype(int))
        return Curve(self.steps[keep], self.values[keep])


def read_curves(path: Path) -> dict[str, Curve]:
    """Curves by key in order of appearance. A last line that a kill cut short is left out.

    Raises:
      InputError: a line is not a JSON object with a numeric `step`.
    """
    points: dict[str, list[tuple[float, float]]] = {}
    with path.open(encoding="utf-8") as lines:
        rows = [_row(path, number, line) for number, line in enumerate(lines, start=1) if line.endswith("\n")]
    for row in rows:
        for key, value in row.items():
            if key not in ("step", "time") and _is_finite(value):
                points.setdefault(key, []).append((row["step"], value))
    return {key: Curve(*np.array(pairs, np.float64).T) for key, pairs in points.items()}


def _row(path: Path, number: int, line: str) -> dict:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise InputError(f"not JSON ({error.msg})", file=path, row=number, value=line) from error
    if not isinstance(row, dict) or "step" not in row or not _is_finite(row["step"]):
        raise InputError("no step", file=path, row=number, value=line, expected='an object with a numeric "step"')
    return row


def _is_finite(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
