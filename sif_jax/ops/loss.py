"""Log-probabilities of given tokens without ever holding [tokens, vocab] whole (pure)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import CustomVJPPrimal
from jaxtyping import Array, Bool, Float, Int, Shaped

from sif_jax.ops.windows import permute
from sif_jax.parallel.partition import constrain, num_shards

# Float32 logits of one chunk: 384 rows of Qwen2.5-VL's vocabulary, above the 240 (TPU v5e) to 300 (H100) rows below which
# reading the head would take longer than multiplying by it.
LOGITS_BYTES = 256 * 2**20
TILE = 128  # rows that matrix units take at once; a rest costs them as much
MIN_CHUNKS = 16  # however small the vocabulary, a chunk's logits are a sixteenth of [tokens, vocab]


def chunked_logprobs(
    hidden: Shaped[Array, "M D"],
    head: Shaped[Array, "D V"],
    targets: Int[Array, "M"],
    wanted: Bool[Array, "M"] | None = None,
    *,
    temperature: float = 1.0,
    chunk: int | None = None,
) -> tuple[Float[Array, "M"], Float[Array, "M"]]:
    """Log-probability of each target and entropy of its distribution, in nats, float32; the entropy has no gradient.

    Chunks of rows go through the head one after another; `chunk` is their length, by default `chunk_rows`. Rows that are not
    `wanted` (prompts, images, padding) go last, and chunks of them alone are left out: what is said of them means nothing. On
    a mesh every device takes chunks of its own rows, side by side, and the head is put together once, not once per chunk.
    """
    count, shards = hidden.shape[0], num_shards(jax.sharding.get_abstract_mesh(), "rows")
    each = -(-count // shards)
    chunk = min(chunk or chunk_rows(each, head.shape[1]), each)
    each += -each % chunk
    padded = each * shards
    head = constrain(head, None, "vocab").astype(hidden.dtype)

    def shares(x: Array) -> Array:
        x = jnp.pad(x, [(0, padded - count)] + [(0, 0)] * (x.ndim - 1))
        return constrain(x.reshape(shards, each, *x.shape[1:]), "rows")

    def chunks(x: Array) -> Array:
        x = x.reshape(shards, -1, chunk, *x.shape[2:]).swapaxes(0, 1)
        return constrain(x.reshape(-1, shards * chunk, *x.shape[3:]), None, "rows")

    def rejoined(x: Array) -> Array:
        return x.reshape(-1, shards, chunk).swapaxes(0, 1).reshape(shards, each)

    asked = shares(jnp.ones(count, bool) if wanted is None else wanted)
    order = jnp.argsort(~asked, axis=1, stable=True)
    place = jnp.argsort(order, axis=1)

    rows = tuple(chunks(permute(x, order, place)) for x in (shares(hidden), shares(targets), asked))
    found = jax.lax.map(lambda rows: _logprobs(rows[0], head, rows[1], rows[2].any(), temperature), rows)
    chosen, entropy = (permute(rejoined(x), place, order) for x in found)
    return chosen.reshape(-1)[:count], entropy.reshape(-1)[:count]


def chunk_rows(count: int, vocab: int) -> int:
    """How many of `count` rows go through the head at once."""
    rows = max(min(-(-count // MIN_CHUNKS), LOGITS_BYTES // (4 * vocab)), 1)
    return rows - rows % TILE if rows > TILE else rows


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _logprobs(
    hidden: Shaped[Array, "M D"],
    head: Shaped[Array, "D V"],
    targets: Int[Array, "M"],
    wanted: Bool[Array, ""],
    temperature: float,
) -> tuple[Float[Array, "M"], Float[Array, "M"]]:
    """Of one chunk; zeros where it is not wanted. A row's gradient is its cotangent times d(log p)/d(hidden), which the forward
    pass has at hand: so the logits, the only large array, are computed once (Liger Kernel, arXiv:2410.10989, section 3.2)."""
    return _if(wanted, lambda: _read(_log_softmax(hidden, head, temperature), targets))


def _logprobs_forward(
    hidden: CustomVJPPrimal,
    head: CustomVJPPrimal,
    targets: CustomVJPPrimal,
    wanted: CustomVJPPrimal,
    temperature: float,
) -> tuple[Any, Any]:
    """What the backward pass needs: d(log p)/d(hidden), and the inputs again where the head is trained."""
    inputs = hidden.value, head.value, targets.value

    def compute() -> tuple[tuple[Array, Array], Array]:
        logprobs = _log_softmax(*inputs[:2], temperature)
        slope = _slope(logprobs, inputs[2], temperature).astype(head.value.dtype)
        return _read(logprobs, inputs[2]), jnp.einsum("mv,dv->md", slope, head.value)

    found, by_hidden = _if(wanted.value, compute)
    return found, (by_hidden, (*inputs, wanted.value) if head.perturbed else None)


def _logprobs_backward(temperature: float, kept: Any, cotangents: Any) -> tuple[Array, Array | None, None, None]:
    by_hidden, inputs = kept
    rows = cotangents[0][:, None]
    by_rows = (rows * by_hidden).astype(by_hidden.dtype)
    if inputs is None:
        return by_rows, None, None, None
    hidden, head, targets, wanted = inputs

    def compute() -> Array:
        slope = rows * _slope(_log_softmax(hidden, head, temperature), targets, temperature)
        return jnp.einsum("md,mv->dv", hidden, slope.astype(hidden.dtype), preferred_element_type=jnp.float32)

    return by_rows, _if(wanted, compute).astype(head.dtype), None, None


_logprobs.defvjp(_logprobs_forward, _logprobs_backward, symbolic_zeros=True)


def _if(wanted: Bool[Array, ""], compute: Callable[[], Any]) -> Any:
    """What it computes, or zeros."""
    shapes = jax.eval_shape(compute)
    return jax.lax.cond(wanted, compute, lambda: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes))


def _log_softmax(hidden: Array, head: Array, temperature: float) -> Float[Array, "M V"]:
    logits = jnp.einsum("md,dv->mv", hidden, head, preferred_element_type=jnp.float32)
    return jax.nn.log_softmax(logits / temperature, axis=-1)


def _read(logprobs: Float[Array, "M V"], targets: Int[Array, "M"]) -> tuple[Float[Array, "M"], Float[Array, "M"]]:
    """The target's log-probability, and the entropy."""
    chosen = jnp.sum(_is_target(logprobs, targets) * logprobs, axis=-1)
    return chosen, -jnp.sum(jnp.exp(logprobs) * logprobs, axis=-1)


def _slope(logprobs: Float[Array, "M V"], targets: Int[Array, "M"], temperature: float) -> Float[Array, "M V"]:
    """d(log p of the target)/d(logits)."""
    return (_is_target(logprobs, targets) - jnp.exp(logprobs)) / temperature


def _is_target(logprobs: Float[Array, "M V"], targets: Int[Array, "M"]) -> Bool[Array, "M V"]:
    """A comparison and not a gather, so that a vocabulary that is split over devices stays so."""
    return targets[:, None] == jnp.arange(logprobs.shape[1])[None]
