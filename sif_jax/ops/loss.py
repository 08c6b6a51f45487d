"""Log-probabilities of given tokens without ever holding [tokens, vocab] whole (pure)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped


def chunked_logprobs(
    hidden: Shaped[Array, "M D"],
    head: Shaped[Array, "D V"],
    targets: Int[Array, "M"],
    *,
    temperature: float = 1.0,
    chunk: int = 1024,
) -> tuple[Float[Array, "M"], Float[Array, "M"]]:
    """Log-probability of each target and entropy of its distribution, in nats, float32.

    Chunks of rows go through the head one after another and are recomputed in the backward pass.
    """
    count = hidden.shape[0]
    chunk = min(chunk, count)
    padding = -count % chunk
    rows = jnp.pad(hidden, ((0, padding), (0, 0))).reshape(-1, chunk, hidden.shape[-1])
    ids = jnp.pad(targets, (0, padding)).reshape(-1, chunk)

    @jax.checkpoint
    def one(args: tuple[Array, Array]) -> tuple[Array, Array]:
        logits = jnp.einsum("md,dv->mv", args[0], head.astype(args[0].dtype), preferred_element_type=jnp.float32)
        logprobs = jax.nn.log_softmax(logits / temperature, axis=-1)
        chosen = jnp.take_along_axis(logprobs, args[1][:, None], axis=-1)[:, 0]
        return chosen, -jnp.sum(jnp.exp(logprobs) * logprobs, axis=-1)

    chosen, entropy = jax.lax.map(one, (rows, ids))
    return chosen.reshape(-1)[:count], entropy.reshape(-1)[:count]
