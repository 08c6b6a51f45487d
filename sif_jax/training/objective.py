"""The clipped objective of GRPO with the unbiased KL estimator (arXiv:2402.03300, eq. 3 and 4) (pure)."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


class PolicyLoss(NamedTuple):
    """Sums over completions; divide by `completions` for the means."""

    loss: Float[Array, ""]
    kl: Float[Array, ""]
    clipped: Float[Array, ""]  # share of a completion's tokens on the clip's flat side
    completions: Float[Array, ""]


def grpo_loss(
    logprobs: Float[Array, "P M T"],
    old_logprobs: Float[Array, "P M T"],
    reference_logprobs: Float[Array, "P M T"],
    advantages: Float[Array, "P M"],
    token_mask: Bool[Array, "P M T"],
    valid: Bool[Array, "P M"],
    *,
    clip_eps: float,
    kl_beta: float,
) -> PolicyLoss:
    """Σ over valid completions of the mean over its tokens of -(min(ρA, clip(ρ)A) - β KL).

    ρ = π/π_old and KL = exp(lr) - lr - 1 with lr = log π_ref - log π. A completion that is not valid adds nothing.
    """
    ratio = jnp.exp(jnp.where(token_mask, logprobs - old_logprobs, 0.0))
    gain = advantages[..., None]
    surrogate = jnp.minimum(ratio * gain, jnp.clip(ratio, 1 - clip_eps, 1 + clip_eps) * gain)
    log_ratio = jnp.where(token_mask, reference_logprobs - logprobs, 0.0)
    kl = jnp.exp(log_ratio) - log_ratio - 1
    clipped = surrogate < ratio * gain
    weights = token_mask * valid[..., None] / jnp.maximum(token_mask.sum(-1, keepdims=True), 1)

    def total(per_token: Array) -> Float[Array, ""]:
        return jnp.sum(per_token * weights)

    return PolicyLoss(total(kl_beta * kl - surrogate), total(kl), total(clipped), valid.sum().astype(jnp.float32))
