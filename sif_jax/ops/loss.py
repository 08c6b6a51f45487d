"""Log-probabilities of given tokens without ever holding [tokens, vocab] whole (pure)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

# Float32 logits of one chunk: 441 rows of Qwen2.5-VL's vocabulary, above the 240 (TPU v5e) to 300 (H100) rows below which
# reading the head would take longer than multiplying by it.
LOGITS_BYTES = 256 * 2**20
MIN_CHUNKS = 16  # however small the vocabulary, a chunk's logits are a sixteenth of [tokens, vocab]


def chunked_logprobs(
    hidden: Shaped[Array, "M D"],
    head: Shaped[Array, "D V"],
    targets: Int[Array, "M"],
    *,
    temperature: float = 1.0,
    chunk: int | None = None,
) -> tuple[Float[Array, "M"], Float[Array, "M"]]:
    """Log-probability of each target and entropy of its distribution, in nats, float32.

    Chunks of rows go through the head one after another and are recomputed in the backward pass; `chunk` is their length,
    by default what the byte budget holds and at most a sixteenth of the rows.
    """
    count = hidden.shape[0]
    chunk = min(chunk or _chunk_rows(count, head.shape[1]), count)
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


def _chunk_rows(count: int, vocab: int) -> int:
    return max(min(-(-count // MIN_CHUNKS), LOGITS_BYTES // (4 * vocab)), 1)
