"""Group-relative advantages (pure)."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from sif_jax.config import RewardsConfig
from sif_jax.rewards.scoring import Scores


def advantages(
    scores: Scores, rewards: RewardsConfig, *, num_samples: int, eps: float = 1e-4, divide_by_std: bool = True
) -> Float[np.ndarray, "prompt sample"]:
    """Advantages of completions that stand prompt by prompt.

    `normalise="per_term"` standardises each term within its group before the weighted sum, so that a term with a wide
    spread does not drown the others (GDPO, arXiv:2601.05242, without its last normalisation over the batch).
    """

    def grouped(values: np.ndarray) -> Array:
        return jnp.asarray(values.reshape(-1, num_samples))

    def standardised(values: np.ndarray) -> Float[np.ndarray, "prompt sample"]:
        return np.asarray(
            group_advantages(grouped(values), grouped(scores.valid), eps=eps, divide_by_std=divide_by_std)
        )

    if rewards.normalise == "total":
        return standardised(scores.total)
    terms = [weight * standardised(getattr(scores, term)) for term, weight in rewards.weights.items()]
    return np.sum(terms, axis=0)


def group_advantages(
    rewards: Float[Array, "prompt sample"],
    valid: Bool[Array, "prompt sample"],
    *,
    eps: float = 1e-4,
    divide_by_std: bool = True,
) -> Float[Array, "prompt sample"]:
    """Standardise each reward within its prompt's group (GRPO, outcome supervision, arXiv:2402.03300).

    A completion that is not valid is left out of mean and standard deviation and gets 0, whatever its reward holds. A
    group of equal rewards, or of fewer than two valid ones, carries no signal and gets 0. Without `divide_by_std` the
    rewards are only centred (Dr. GRPO, arXiv:2503.20783).
    """
    count = jnp.maximum(valid.sum(axis=1, keepdims=True), 1)
    mean = jnp.where(valid, rewards, 0).sum(axis=1, keepdims=True) / count
    centred = jnp.where(valid, rewards - mean, 0)
    std = jnp.sqrt((centred**2).sum(axis=1, keepdims=True) / count)
    highest = jnp.where(valid, rewards, -jnp.inf).max(axis=1, keepdims=True)
    lowest = jnp.where(valid, rewards, jnp.inf).min(axis=1, keepdims=True)
    # Rounding of the mean must not turn equal rewards into a signal.
    return jnp.where(highest > lowest, centred / (std + eps) if divide_by_std else centred, 0)
