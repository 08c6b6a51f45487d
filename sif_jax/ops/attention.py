"""Attention with grouped queries: over one sequence, and over a shared prefix plus an own suffix (pure).

Keys and values are head-major, [K, S, H], so that both products are plain batched matrix products and a cache is read in
place. The softmax is float32 and its division comes last, on [T, H] instead of [T, S].
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

MASKED = -1e30  # finite, so that a row that may see nothing gets a mean instead of NaN


def attention(
    q: Shaped[Array, "B T N H"],
    k: Shaped[Array, "B K S H"],
    v: Shaped[Array, "B K S H"],
    mask: Bool[Array, "#B T S"],
) -> Shaped[Array, "B T N H"]:
    """softmax(q kᵀ / √H) v; query head n reads key head n // (N/K)."""
    batch, length, heads, _ = q.shape
    logits = _logits(_grouped(q, k.shape[1]), k).reshape(batch, -1, length, k.shape[2])
    logits = logits + jnp.where(mask, 0.0, MASKED)[:, None]
    weights = jnp.exp(logits - jax.lax.stop_gradient(logits.max(-1, keepdims=True)))
    total = weights.sum(-1).reshape(batch, heads, length, 1)
    summed = _sum(weights.reshape(batch, k.shape[1], -1, k.shape[2]), v)
    return (summed.reshape(batch, heads, length, -1) / total).swapaxes(1, 2).astype(v.dtype)


def prefix_attention(
    q: Shaped[Array, "P M T N H"],
    prefix_k: Shaped[Array, "P K S H"],
    prefix_v: Shaped[Array, "P K S H"],
    prefix_mask: Bool[Array, "P S"],
    k: Shaped[Array, "P M K U H"],
    v: Shaped[Array, "P M K U H"],
    mask: Bool[Array, "T U"],
) -> Shaped[Array, "P M T N H"]:
    """Each of the M samples of a prompt attends to the prompt's keys, held once, and to its own U keys.

    One softmax runs over both parts, so the result equals attention over the concatenated sequence.
    """
    prompts, samples, length, heads, dim = q.shape
    num_keys = prefix_k.shape[1]
    every = _grouped(q.reshape(prompts, samples * length, heads, dim), num_keys)
    each = _grouped(q.reshape(prompts * samples, length, heads, dim), num_keys)
    own_k, own_v = (x.reshape(prompts * samples, *x.shape[2:]) for x in (k, v))

    def per_head(x: Array, width: int) -> Array:
        """Rows of either product as [P, M, N, T, width]."""
        if x.shape[0] == prompts * samples:
            return x.reshape(prompts, samples, heads, length, width)
        return x.reshape(prompts, heads, samples, length, width).swapaxes(1, 2)

    shared = per_head(_logits(every, prefix_k), prefix_k.shape[2])
    own = per_head(_logits(each, own_k), own_k.shape[2])
    shared = shared + jnp.where(prefix_mask, 0.0, MASKED)[:, None, None, None]
    own = own + jnp.where(mask, 0.0, MASKED)[None, None, None]
    top = jax.lax.stop_gradient(jnp.maximum(shared.max(-1, keepdims=True), own.max(-1, keepdims=True)))
    shared, own = jnp.exp(shared - top), jnp.exp(own - top)
    total = shared.sum(-1, keepdims=True) + own.sum(-1, keepdims=True)
    summed = per_head(
        _sum(shared.swapaxes(1, 2).reshape(prompts, num_keys, -1, shared.shape[-1]), prefix_v), dim
    ) + per_head(_sum(own.reshape(prompts * samples, num_keys, -1, own.shape[-1]), own_v), dim)
    return (summed / total).swapaxes(2, 3).astype(v.dtype)


def head_major(x: Shaped[Array, "*batch T K H"]) -> Shaped[Array, "*batch K T H"]:
    return x.swapaxes(-2, -3)


def segment_mask(segments: Int[Array, "B T"]) -> Bool[Array, "B T T"]:
    return segments[:, :, None] == segments[:, None, :]


def _grouped(q: Shaped[Array, "B T N H"], num_keys: int) -> Shaped[Array, "B K GT H"]:
    """The queries of each key head, head by head, scaled."""
    q = q.swapaxes(1, 2) * q.shape[-1] ** -0.5
    return q.reshape(q.shape[0], num_keys, -1, q.shape[-1])


def _logits(q: Shaped[Array, "B K GT H"], k: Shaped[Array, "B K S H"]) -> Float[Array, "B K GT S"]:
    return jnp.einsum("bkth,bksh->bkts", q, k, preferred_element_type=jnp.float32)


def _sum(weights: Float[Array, "B K GT S"], v: Shaped[Array, "B K S H"]) -> Float[Array, "B K GT H"]:
    return jnp.einsum("bkts,bksh->bkth", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
