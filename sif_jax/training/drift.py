"""How far the sampler's log-probabilities are from the trainer's on the same tokens (pure).

Both come from the same weights. In float32 they differ by rounding alone; in bfloat16 the importance ratio
ρ = π_trainer / π_sampler tells how far sampling has left the policy that learns.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


class SamplerDrift(NamedTuple):
    """Sums over the tokens that count, and a maximum; zeros are neutral to `plus`."""

    gap: Float[Array, ""]  # |log ρ|
    ratio: Float[Array, ""]  # ρ
    ratio_squared: Float[Array, ""]
    ratio_max: Float[Array, ""]

    def plus(self, other: SamplerDrift) -> SamplerDrift:
        added = SamplerDrift(*map(jnp.add, self, other))
        return added._replace(ratio_max=jnp.maximum(self.ratio_max, other.ratio_max))

    def metrics(self, tokens: float) -> dict[str, float]:
        """The effective share is (Σρ)² / (n Σρ²), 1 when all ratios are equal (Kish's effective sample size)."""
        ratio, squared = float(self.ratio), float(self.ratio_squared)
        return {
            "sampler_gap": float(self.gap) / tokens,
            "sampler_ratio_mean": ratio / tokens,
            "sampler_ratio_max": float(self.ratio_max),
            "sampler_effective_share": ratio**2 / (tokens * squared) if squared else 0.0,
        }


def sampler_drift(
    logprobs: Float[Array, "P M T"], sampled_logprobs: Float[Array, "P M T"], counted: Bool[Array, "P M T"]
) -> SamplerDrift:
    log_ratio = jnp.where(counted, logprobs - sampled_logprobs, 0.0)
    ratio = jnp.exp(log_ratio) * counted
    return SamplerDrift(jnp.abs(log_ratio).sum(), ratio.sum(), jnp.square(ratio).sum(), ratio.max())
