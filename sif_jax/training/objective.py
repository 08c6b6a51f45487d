"""The clipped policy objectives and the KL to the reference, as sums that add up over micro-batches (pure).

With ρ = π/π_old of a token and A the completion's advantage, all of them minimise -min(ρA, clip(ρ, 1 - low, 1 + high)A)
+ β KL. They differ in what is averaged:

    grpo     over the tokens of each completion, then over completions (arXiv:2402.03300, eq. 3)
    dr_grpo  sum over tokens / max_new_tokens, then over completions; A is not divided by the std (arXiv:2503.20783)
    dapo     over all tokens of the step; high > low (arXiv:2503.14476)
    gspo     as grpo, and ρ is the geometric mean of the completion's token ratios (arXiv:2507.18071, eq. 5 and 7)

KL of a token, lr = log π_ref - log π (arXiv:2506.09477 on their gradients):

    k1  -lr           unbiased; as a KL in the reward its gradient is k1 ∇log π, unbiased
    k2  lr²/2         biased; its gradient is the same one
    k3  e^lr - lr - 1 unbiased with low variance; its gradient is that of KL(π_ref‖π), the paper's choice
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Shaped

from sif_jax.config import ObjectiveConfig


class PolicyLoss(NamedTuple):
    """`loss` / `count` is the objective of a step; the others are sums over the `tokens` that count, and a maximum."""

    loss: Float[Array, ""]
    count: Float[Array, ""]
    tokens: Float[Array, ""]
    kl: Float[Array, ""]
    clipped_low: Float[Array, ""]
    clipped_high: Float[Array, ""]
    ratio: Float[Array, ""]
    ratio_max: Float[Array, ""]

    def plus(self, other: PolicyLoss) -> PolicyLoss:
        added = PolicyLoss(*map(jnp.add, self, other))
        return added._replace(ratio_max=jnp.maximum(self.ratio_max, other.ratio_max))


def policy_loss(
    logprobs: Float[Array, "P M T"],
    old_logprobs: Float[Array, "P M T"],
    reference_logprobs: Float[Array, "P M T"] | None,
    advantages: Float[Array, "P M"],
    token_mask: Bool[Array, "P M T"],
    valid: Bool[Array, "P M"],
    *,
    objective: ObjectiveConfig,
    max_new_tokens: int,
) -> PolicyLoss:
    """Sums over the tokens of valid completions; the others add nothing, whatever they hold. No reference: no KL."""
    counted = token_mask & valid[..., None]
    lengths = jnp.maximum(counted.sum(-1, keepdims=True), 1)
    completions, tokens = valid.sum().astype(jnp.float32), counted.sum().astype(jnp.float32)

    log_ratio = jnp.where(counted, logprobs - old_logprobs, 0.0)
    if objective.kind == "gspo":
        log_ratio = jnp.where(counted, log_ratio.sum(-1, keepdims=True) / lengths, 0.0)
    ratio = jnp.exp(log_ratio)
    gain = jnp.where(valid, advantages, 0.0)[..., None]
    low, high = objective.clip
    surrogate = jnp.minimum(ratio * gain, jnp.clip(ratio, 1 - low, 1 + high) * gain)
    if reference_logprobs is None:
        kl = jnp.zeros_like(ratio)
    else:
        kl = kl_estimate(
            jnp.where(counted, logprobs, 0.0), jnp.where(counted, reference_logprobs, 0.0), kind=objective.kl
        )

    match objective.kind:
        case "grpo" | "gspo":
            weights, count = counted / lengths, completions
        case "dr_grpo":
            weights, count = counted, completions * max_new_tokens
        case "dapo":
            weights, count = counted, tokens

    def over_tokens(values: Shaped[Array, "P M T"]) -> Float[Array, ""]:
        return jnp.sum(jnp.where(counted, values, 0.0))

    return PolicyLoss(
        loss=over_tokens((objective.kl_beta * kl - surrogate) * weights),
        count=count,
        tokens=tokens,
        kl=over_tokens(kl),
        clipped_low=over_tokens((gain < 0) & (ratio < 1 - low)),
        clipped_high=over_tokens((gain > 0) & (ratio > 1 + high)),
        ratio=over_tokens(ratio),
        ratio_max=jnp.max(jnp.where(counted, ratio, 0.0)),
    )


def kl_estimate(
    logprobs: Float[Array, "*tokens"], reference_logprobs: Float[Array, "*tokens"], *, kind: Literal["k1", "k2", "k3"]
) -> Float[Array, "*tokens"]:
    """KL(π‖π_ref) at tokens that π sampled; the gradients are those of the module's table."""
    log_ratio = reference_logprobs - logprobs
    match kind:
        case "k1":  # differentiated as it stands, it would give ∇log π, whose mean is 0
            constant = jax.lax.stop_gradient(log_ratio)
            return -constant * jnp.exp(logprobs - jax.lax.stop_gradient(logprobs))
        case "k2":
            return jnp.square(log_ratio) / 2
        case "k3":
            return jnp.expm1(log_ratio) - log_ratio
