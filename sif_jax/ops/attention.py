"""Attention with grouped queries: over one sequence, and over a shared prefix plus an own suffix (pure)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

MASKED = -1e30  # finite, so that a row that may see nothing gets a mean instead of NaN


def attention(
    q: Shaped[Array, "B T N H"],
    k: Shaped[Array, "B S K H"],
    v: Shaped[Array, "B S K H"],
    mask: Bool[Array, "#B T S"],
) -> Shaped[Array, "B T N H"]:
    """softmax(q kᵀ / √H) v with float32 softmax; query head n reads key head n // (N/K)."""
    q = _grouped(q, k.shape[-2])
    logits = jnp.einsum("btkgh,bskh->bkgts", q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
    probs = jax.nn.softmax(jnp.where(mask[:, None, None], logits, MASKED), axis=-1).astype(v.dtype)
    return _ungrouped(jnp.einsum("bkgts,bskh->btkgh", probs, v))


def prefix_attention(
    q: Shaped[Array, "P M T N H"],
    prefix_k: Shaped[Array, "P S K H"],
    prefix_v: Shaped[Array, "P S K H"],
    prefix_mask: Bool[Array, "P S"],
    k: Shaped[Array, "P M U K H"],
    v: Shaped[Array, "P M U K H"],
    mask: Bool[Array, "#P #M T U"],
) -> Shaped[Array, "P M T N H"]:
    """Each of the M samples of a prompt attends to the prompt's keys, held once, and to its own U keys.

    One softmax runs over both parts, so the result equals attention over the concatenated sequence.
    """
    q = _grouped(q, k.shape[-2])
    scale = q.shape[-1] ** -0.5
    shared = jnp.einsum("pmtkgh,pskh->pmkgts", q, prefix_k, preferred_element_type=jnp.float32) * scale
    own = jnp.einsum("pmtkgh,pmukh->pmkgtu", q, k, preferred_element_type=jnp.float32) * scale
    shared = jnp.where(prefix_mask[:, None, None, None, None, :], shared, MASKED)
    own = jnp.where(mask[:, :, None, None], own, MASKED)
    top = jnp.maximum(shared.max(-1, keepdims=True), own.max(-1, keepdims=True))
    shared, own = jnp.exp(shared - top), jnp.exp(own - top)
    total = shared.sum(-1) + own.sum(-1)
    summed = jnp.einsum(
        "pmkgts,pskh->pmtkgh", shared.astype(v.dtype), prefix_v, preferred_element_type=jnp.float32
    ) + jnp.einsum("pmkgtu,pmukh->pmtkgh", own.astype(v.dtype), v, preferred_element_type=jnp.float32)
    return _ungrouped((summed / jnp.moveaxis(total, -1, 2)[..., None]).astype(v.dtype))


def packed_causal_mask(segments: Int[Array, "B T"]) -> Bool[Array, "B T T"]:
    """Position t sees s <= t of its own segment; padding (segment 0) sees only padding."""
    length = segments.shape[-1]
    return (segments[:, :, None] == segments[:, None, :]) & jnp.tril(jnp.ones((1, length, length), bool))


def segment_mask(segments: Int[Array, "B T"]) -> Bool[Array, "B T T"]:
    return segments[:, :, None] == segments[:, None, :]


def _grouped(q: Float[Array, "*batch N H"], num_kv_heads: int) -> Float[Array, "*batch K G H"]:
    return q.reshape(*q.shape[:-2], num_kv_heads, q.shape[-2] // num_kv_heads, q.shape[-1])


def _ungrouped(x: Float[Array, "*batch K G H"]) -> Float[Array, "*batch N H"]:
    return x.reshape(*x.shape[:-3], x.shape[-3] * x.shape[-2], x.shape[-1])
