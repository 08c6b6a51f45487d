"""Which depths of a trace agree with the depth map (host)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from sif_jax.sif.depth_codec import box_mean_depth
from sif_jax.sif.grammar import BoxDepth

_RELATIVE_TOLERANCE = 0.1
# Half of a written thousandth: the relative error is undefined at a mean depth of 0, where only 0.000 is right.
_ZERO_TOLERANCE = 0.0005
# A mean in float32.
_ROUNDING = 1e-6


def depth_hits(pairs: Iterable[BoxDepth], depth_norm: Float[np.ndarray, "h w"]) -> Bool[np.ndarray, "pair"]:
    """Per pair, whether its depth agrees with the mean of the depth map inside its box; false if it cannot be read."""
    means = ((pair.depth, box_mean_depth(depth_norm, pair.box_norm)) for pair in pairs)
    return np.array([mean is not None and agrees(depth, mean) for depth, mean in means], bool)


def agrees(depth: Any, mean_depth: Any) -> Any:
    """Whether |d - d_gt| / d_gt <= 0.1, of numbers or arrays; at d_gt = 0, whether d is 0."""
    tolerance = _RELATIVE_TOLERANCE * mean_depth + _ZERO_TOLERANCE * (mean_depth == 0)
    return abs(depth - mean_depth) <= tolerance + _ROUNDING
