"""Choose the next token: greedy, temperature, top-k, top-p, min-p, forbidden ids (pure).

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
    """How to continue a prompt. `temperature` 0 is greedy; `top_k` 0, `top_p` 1 and `min_p` 0 keep every token.

    A completion ends with one of `stop_ids`, or with the token that completes one of the strings `stop`.
    """

    max_new_tokens: int
    stop_ids: tuple[int, ...]
    forbidden_ids: tuple[int, ...] = ()
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise InputError("no room for a token", value=self.max_new_tokens, expected="max_new_tokens >= 1")
        if not self.temperature >= 0:
            raise InputError("negative temperature", value=self.temperature, expected="0 (greedy) or more")
        if self.top_k < 0:
            raise InputError("top_k out of range", value=self.top_k, expected="0 (off) or more")
        if not 0 < self.top_p <= 1:
            raise InputError("top_p out of range", value=self.top_p, expected="0 < top_p <= 1")
        if not 0 <= self.min_p <= 1:
            raise InputError("min_p out of range", value=self.min_p, expected="0 <= min_p <= 1")
        if isinstance(self.stop, str) or not all(self.stop):
            raise InputError("not a list of stop strings", value=self.stop, expected="strings that are not empty")


def sample_keys(seed: int, step: int, prompt_ids: Int[np.ndarray, "P"], num_samples: int) -> Key[Array, "P M"]:
    """One key per sample; the position is folded in at each token."""
    base = jax.random.fold_in(jax.random.key(seed), step)
    fold = jax.vmap(jax.random.fold_in, in_axes=(None, 0))
    return jax.vmap(fold, in_axes=(0, None))(fold(base, jnp.asarray(prompt_ids)), jnp.arange(num_samples))


def choose(
    logits: Float[Array, "R V"], keys: Key[Array, "R"], positions: Int[Array, "R"], sampling: Sampling
) -> tuple[Int[Array, "R"], Float[Array, "R"]]:
    """Each row's next token, number `positions` of its completion, and its log-probability at this temperature (1 when
    greedy).

    Forbidden and truncated tokens are never drawn, but the log-probability is that of the whole softmax, as the trainer
    computes it.
    """
    scaled = logits / (sampling.temperature or 1.0)
    allowed = _truncate(_forbid(scaled, sampling.forbidden_ids), sampling)
    if sampling.temperature == 0:
        tokens = jnp.argmax(allowed, axis=-1)
    else:
        tokens = jax.vmap(jax.random.categorical)(jax.vmap(jax.random.fold_in)(keys, positions), allowed)
    chosen = jnp.take_along_axis(scaled, tokens[:, None], axis=-1)[:, 0]
    return tokens.astype(jnp.int32), chosen - jax.nn.logsumexp(scaled, axis=-1)


def _forbid(logits: Float[Array, "R V"], ids: tuple[int, ...]) -> Float[Array, "R V"]:
    if not ids:
        return logits
    forbidden = np.zeros((1, logits.shape[-1]), bool)
    forbidden[:, list(ids)] = True
    return jnp.where(forbidden, -jnp.inf, logits)


def _truncate(logits: Float[Array, "R V"], sampling: Sampling) -> Float[Array, "R V"]:
    """Top-k, of what is left top-p, of what is left min-p."""
    if sampling.temperature == 0:
        return logits
    if sampling.top_k:
        kept = min(sampling.top_k, logits.shape[-1])
        logits = jnp.where(logits < jax.lax.top_k(logits, kept)[0][..., -1:], -jnp.inf, logits)
    if sampling.top_p < 1:
        ordered = jnp.sort(logits, axis=-1, descending=True)
        before = jnp.cumsum(jax.nn.softmax(ordered), axis=-1) - jax.nn.softmax(ordered)
        last = jnp.where(before < sampling.top_p, ordered, jnp.inf).min(-1, keepdims=True)
        logits = jnp.where(logits < last, -jnp.inf, logits)
    if sampling.min_p > 0:
        least = logits.max(-1, keepdims=True) + np.log(sampling.min_p)
        logits = jnp.where(logits < least, -jnp.inf, logits)
    return logits
