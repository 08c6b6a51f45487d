"""What a policy says about given tokens: the loss of packed rows, and log-probabilities of sampled completions (pure)."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

from sif_jax.models.qwen2_5_vl.model import Batch, Qwen2_5_VL
from sif_jax.ops.loss import chunked_logprobs
from sif_jax.ops.packing import Packing
from sif_jax.ops.windows import take_rows
from sif_jax.rollout.engine import next_positions


class TokenSums(NamedTuple):
    """Sums over target tokens, so that micro-batches of different sizes add up to the true mean."""

    nll: Float[Array, ""]  # nats
    correct: Float[Array, ""]  # tokens whose probability is above one half
    tokens: Float[Array, ""]


def next_token_loss(
    model: Qwen2_5_VL, batch: Batch, key: Array | None, *, packed: bool = True
) -> tuple[Float[Array, ""], TokenSums]:
    """Summed negative log-likelihood of the target tokens, each predicted from the token before it."""
    hidden = model.hidden(batch, key, packed=packed)[:, :-1]
    targets, mask = batch["tokens"][:, 1:], batch["loss_mask"][:, 1:]
    mask = mask.reshape(-1)
    logprobs, _ = chunked_logprobs(hidden.reshape(-1, hidden.shape[-1]), model.head(), targets.reshape(-1), mask > 0)
    nll = -jnp.sum(logprobs * mask)
    return nll, TokenSums(nll, jnp.sum(mask * (logprobs > jnp.log(0.5))), mask.sum())


def completion_logprobs(
    model: Qwen2_5_VL,
    batch: Batch,
    features: Shaped[Array, "P I D"] | None,
    ids: Int[Array, "P M T"],
    token_mask: Bool[Array, "P M T"] | None = None,
    *,
    temperature: float,
    packing: Packing | None = None,
    key: Array | None = None,
) -> tuple[Float[Array, "P M T"], Float[Array, "P M T"]]:
    """Log-probabilities of the completions of each prompt, and the entropy at each of their tokens, in nats.

    The prompt runs once per group; `features` are the prompt's image features when the vision tower is frozen. What is said of
    tokens outside `token_mask` means nothing; without one, all count. `packing` holds the tokens of the mask.
    """
    prompts, samples, length = ids.shape
    real = batch["segments"] > 0
    positions = next_positions(batch)[:, None] + jnp.arange(length)[None]
    positions = jnp.broadcast_to(positions[:, None, :, None], (prompts, samples, length, 3))
    prompt_hidden, hidden = model.decoder.group_forward(
        model.embed_prompt(batch, features, key),
        batch["positions"],
        batch["segments"],
        model.embed(ids),
        positions,
        packing=packing,
        remat=model.remat,
        key=key,
    )
    last = take_rows(prompt_hidden, real.sum(-1, keepdims=True) - 1)
    before = jnp.broadcast_to(last[:, None], (prompts, samples, 1, last.shape[-1]))
    hidden = jnp.concatenate([before, hidden[:, :, :-1]], axis=2)
    logprobs, entropy = chunked_logprobs(
        hidden.reshape(-1, hidden.shape[-1]),
        model.head(),
        ids.reshape(-1),
        None if token_mask is None else token_mask.reshape(-1),
        temperature=temperature,
    )
    return logprobs.reshape(ids.shape), entropy.reshape(ids.shape)
