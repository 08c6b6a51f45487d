"""Which depths of a trace agree with the depth map (host)."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from jaxtyping import Bool, Float

from sif_jax.sif.depth_codec import box_mean_depth
from sif_jax.sif.grammar import BoxDepth

_RELATIVE_TOLERANCE = 0.1
# Half of a written thousandth: the relative error is undefined at a mean depth of 0, where only 0.000 is right.
_ZERO_TOLERANCE = 0.0005
_ROUNDING = 1e-9


def depth_hits(pairs: Iterable[BoxDepth], depth_norm: Float[np.ndarray, "h w"]) -> Bool[np.ndarray, "pair"]:
    """Per pair, whether |d - d_gt| / d_gt <= 0.1, with d_gt the mean of the depth map inside the box.

    At d_gt = 0, whether d is 0; false for a depth that cannot be read (NaN).
    """
    return np.array([_is_hit(pair.depth, box_mean_depth(depth_norm, pair.box_norm)) for pair in pairs], bool)


def _is_hit(depth: float, mean_depth: float | None) -> bool:
    if mean_depth is None:
        return False
    return (
        abs(depth - mean_depth)
        <= max(_RELATIVE_TOLERANCE * mean_depth, _ZERO_TOLERANCE * (mean_depth == 0)) + _ROUNDING
    )
