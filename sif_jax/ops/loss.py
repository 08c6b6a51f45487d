"""Log-probabilities of given tokens without ever holding [tokens, vocab] whole (pure)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

from sif_jax.parallel.partition import constrain, num_shards

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
    by default what the byte budget holds and at most a sixteenth of the rows. On a mesh every device takes chunks of its own
    rows, side by side, and the head is put together once, not once per chunk.
    """
    count, shards = hidden.shape[0], num_shards(jax.sharding.get_abstract_mesh(), "rows")
    each = -(-count // shards)
    chunk = min(chunk or _chunk_rows(each, head.shape[1]), each)
    each += -each % chunk
    head = constrain(head, None, "vocab")

    def chunks(x: Array) -> Array:
        x = jnp.pad(x, [(0, each * shards - count)] + [(0, 0)] * (x.ndim - 1))
        x = constrain(x.reshape(shards, each, *x.shape[1:]), "rows")
        x = x.reshape(shards, -1, chunk, *x.shape[2:]).swapaxes(0, 1)
        return constrain(x.reshape(-1, shards * chunk, *x.shape[3:]), None, "rows")

    def rejoined(x: Array) -> Array:
        x = x.reshape(-1, shards, chunk).swapaxes(0, 1)
        return x.reshape(-1)[:count]

    vocabulary = jnp.arange(head.shape[1])[None]

    @jax.checkpoint
    def one(args: tuple[Array, Array]) -> tuple[Array, Array]:
        logits = jnp.einsum("md,dv->mv", args[0], head.astype(args[0].dtype), preferred_element_type=jnp.float32)
        logprobs = jax.nn.log_softmax(logits / temperature, axis=-1)
        # A comparison and not a gather, whose gradient would scatter into an array of the logits' size.
        chosen = jnp.sum(jnp.where(args[1][:, None] == vocabulary, logprobs, 0.0), axis=-1)
        return chosen, -jnp.sum(jnp.exp(logprobs) * logprobs, axis=-1)

    chosen, entropy = jax.lax.map(one, (chunks(hidden), chunks(targets)))
    return rejoined(chosen), rejoined(entropy)


def _chunk_rows(count: int, vocab: int) -> int:
    return max(min(-(-count // MIN_CHUNKS), LOGITS_BYTES // (4 * vocab)), 1)
