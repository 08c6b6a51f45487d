"""What both engines of the decoding bench are given and give back (pure)."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from sif_jax.config import DecodeBenchConfig
from sif_jax.rollout.sampling import Sampling
from sif_jax.rollout.schedule import Usage


class Workload(NamedTuple):
    batch: dict[str, np.ndarray]  # prompts, equally long
    limits: Int[np.ndarray, "P M"]  # tokens of each completion, exactly
    sampling: Sampling

    def with_one_token(self) -> Workload:
        return self._replace(limits=np.ones_like(self.limits))


class Timed(NamedTuple):
    seconds: float
    tokens: Int[np.ndarray, "P M T"]  # 0 after the end
    usage: Usage | None = None


def random_lengths(config: DecodeBenchConfig) -> Int[np.ndarray, "P M"]:
    """Evenly spread over the range, in random order."""
    count = config.prompts * config.samples
    lengths = np.linspace(config.min_new_tokens, config.max_new_tokens, count).round().astype(np.int32)
    return np.random.default_rng(config.seed).permutation(lengths).reshape(config.prompts, config.samples)
