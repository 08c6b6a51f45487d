"""Choose the next token: greedy, temperature, top-k, top-p, forbidden ids (pure).

Random keys come from (run seed, step, prompt, sample, position), so a sample is the same whatever shares its batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from sif_jax.errors import InputError


@dataclass(frozen=True)
class Sampling:
    """How to continue a prompt. `temperature` 0 is greedy; `top_k` 0 and `top_p` 1 keep every token."""

    max_new_tokens: int
    stop_ids: tuple[int, ...]
    forbidden_ids: tuple[int, ...] = ()
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise InputError("no room for a token", value=self.max_new_tokens, expected="max_new_tokens >= 1")
        if self.temperature < 0:
            raise InputError("negative temperature", value=self.temperature, expected="0 (greedy) or more")
        if not 0 < self.top_p <= 1:
            raise InputError("top_p out of range", value=self.top_p, expected="0 < top_p <= 1")


def sample_keys(seed: int, step: int, prompt_ids: Int[np.ndarray, "P"], num_samples: int) -> Key[Array, "P M"]:
    """One key per sample; the position is folded in at each token."""
    base = jax.random.fold_in(jax.random.key(seed), step)
    fold = jax.vmap(jax.random.fold_in, in_axes=(None, 0))
    return jax.vmap(fold, in_axes=(0, None))(fold(base, jnp.asarray(prompt_ids)), jnp.arange(num_samples))


def choose(
    logits: Float[Array, "P M V"], keys: Key[Array, "P M"], position: Int[Array, ""], sampling: Sampling
) -> tuple[Int[Array, "P M"], Float[Array, "P M"]]:
    """The next tokens and their log-probabilities under the model at this temperature (1 when greedy).

    Forbidden and truncated tokens are never drawn, but the log-probability is that of the whole softmax, as the trainer
    computes it.
    """
    scaled = logits / (sampling.temperature or 1.0)
    allowed = _truncate(_forbid(scaled, sampling.forbidden_ids), sampling)
    if sampling.temperature == 0:
        tokens = jnp.argmax(allowed, axis=-1)
    else:
        tokens = jax.vmap(jax.vmap(lambda key, row: jax.random.categorical(jax.random.fold_in(key, position), row)))(
            keys, allowed
        )
    logprobs = jnp.take_along_axis(jax.nn.log_softmax(scaled), tokens[..., None], axis=-1)[..., 0]
    return tokens.astype(jnp.int32), logprobs


def _forbid(logits: Float[Array, "P M V"], ids: tuple[int, ...]) -> Float[Array, "P M V"]:
    return logits.at[..., np.array(ids, np.int32)].set(-jnp.inf) if ids else logits


def _truncate(logits: Float[Array, "P M V"], sampling: Sampling) -> Float[Array, "P M V"]:
    if sampling.top_k:
        kept = min(sampling.top_k, logits.shape[-1])
        logits = jnp.where(logits < jax.lax.top_k(logits, kept)[0][..., -1:], -jnp.inf, logits)
    if sampling.top_p < 1:
        ordered = jnp.sort(logits, axis=-1, descending=True)
        before = jnp.cumsum(jax.nn.softmax(ordered), axis=-1) - jax.nn.softmax(ordered)
        last = jnp.where(before < sampling.top_p, ordered, jnp.inf).min(-1, keepdims=True)
        logits = jnp.where(logits < last, -jnp.inf, logits)
    return logits
