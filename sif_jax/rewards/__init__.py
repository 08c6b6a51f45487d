"""Rewards of GRPO-SIF; names load on first use, so that importing this room does not import jax (pure)."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sif_jax.rewards.advantages import group_advantages
    from sif_jax.rewards.scoring import Scores, score
    from sif_jax.sif.overlap import hiou

_MODULES = {
    "Scores": "sif_jax.rewards.scoring",
    "group_advantages": "sif_jax.rewards.advantages",
    "hiou": "sif_jax.sif.overlap",
    "score": "sif_jax.rewards.scoring",
}

__all__ = ["Scores", "group_advantages", "hiou", "score"]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)
