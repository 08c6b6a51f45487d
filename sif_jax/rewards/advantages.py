"""Group-relative advantages (pure)."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


def group_advantages(
    rewards: Float[Array, "prompt sample"], valid: Bool[Array, "prompt sample"], *, eps: float = 1e-4
) -> Float[Array, "prompt sample"]:
    """Standardise each reward within its prompt's group (GRPO, outcome supervision, arXiv:2402.03300).

    A completion that is not valid is left out of mean and standard deviation and gets 0, whatever its reward holds. A
    group of equal rewards, or of fewer than two valid ones, carries no signal and gets 0.
    """
    count = jnp.maximum(valid.sum(axis=1, keepdims=True), 1)
    mean = jnp.where(valid, rewards, 0).sum(axis=1, keepdims=True) / count
    centred = jnp.where(valid, rewards - mean, 0)
    std = jnp.sqrt((centred**2).sum(axis=1, keepdims=True) / count)
    highest = jnp.where(valid, rewards, -jnp.inf).max(axis=1, keepdims=True)
    lowest = jnp.where(valid, rewards, jnp.inf).min(axis=1, keepdims=True)
    # Rounding of the mean must not turn equal rewards into a signal.
    return jnp.where(highest > lowest, centred / (std + eps), 0)
