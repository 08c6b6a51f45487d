"""Attention with grouped queries: over one sequence, and over a shared prefix plus an own suffix (pure).

Keys and values are head-major, [K, S, H], so that both products are plain batched matrix products and a cache is read in
place. The softmax is float32 and its division comes last, on [T, H] instead of [T, S].
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

from sif_jax.ops.windows import take_rows

MASKED = -1e30  # finite, so that a row that may see nothing gets a mean instead of NaN


class Partial(NamedTuple):
    """Attention over some of the keys: the weighted sum of their values, not divided yet, and what it is divided by."""

    summed: Float[Array, "B N T H"]
    total: Float[Array, "B N T 1"]  # of exp(logits - top)
    top: Float[Array, "B N T 1"]  # the largest logit


def attention(
    q: Shaped[Array, "B T N H"],
    k: Shaped[Array, "B K S H"],
    v: Shaped[Array, "B K S H"],
    mask: Bool[Array, "#B T S"],
) -> Shaped[Array, "B T N H"]:
    """softmax(q kᵀ / √H) v; query head n reads key head n // (N/K)."""
    part = partial_attention(q, k, v, mask)
    return (part.summed / part.total).swapaxes(1, 2).astype(v.dtype)


def row_attention(
    q: Shaped[Array, "R N H"],
    prefix_k: Shaped[Array, "G K S H"],
    prefix_v: Shaped[Array, "G K S H"],
    prefix_mask: Bool[Array, "G S"],
    k: Shaped[Array, "R K U H"],
    v: Shaped[Array, "R K U H"],
    mask: Bool[Array, "R U"],
    members: Int[Array, "lane g M"],
    place: Int[Array, "lane r"],
) -> Shaped[Array, "R N H"]:
    """One query of each of R rows attends to its prompt's keys, held once, and to its own; rows belong to G prompts in any order.

    Rows and prompts are those of lane 0, lane 1, …, and a row's prompt is in its lane. `members` are the rows of each prompt,
    counted in their lane and filled up with any row; a row stands at `place` of its lane's flattened members. Only queries
    and results are moved between the two orders, never keys.
    """
    num_lanes, _, samples = members.shape
    rows, heads, dim = q.shape
    queries = take_in_lanes(q, members.reshape(num_lanes, -1)).reshape(-1, samples, heads, dim)
    shared = partial_attention(queries, prefix_k, prefix_v, prefix_mask[:, None])
    own = partial_attention(q[:, None], k, v, mask[:, None])

    def per_row(x: Array) -> Array:
        return take_in_lanes(x.swapaxes(1, 2).reshape(-1, heads, x.shape[-1]), place)[:, :, None]

    return merged(Partial(*map(per_row, shared)), own).reshape(rows, heads, dim).astype(v.dtype)


def take_in_lanes(x: Shaped[Array, "I *rest"], index: Int[Array, "lane o"]) -> Shaped[Array, "O *rest"]:
    """Rows of each lane's own share of x, so that lanes on several devices exchange nothing."""
    rest = x.shape[1:]
    return take_rows(x.reshape(len(index), -1, *rest), index).reshape(-1, *rest)


def partial_attention(
    q: Shaped[Array, "B T N H"],
    k: Shaped[Array, "B K S H"],
    v: Shaped[Array, "B K S H"],
    mask: Bool[Array, "#B #T S"],
) -> Partial:
    batch, length, heads, _ = q.shape
    logits = _logits(_grouped(q, k.shape[1]), k).reshape(batch, heads, length, k.shape[2])
    logits = logits + jnp.where(mask, 0.0, MASKED)[:, None]
    top = jax.lax.stop_gradient(logits.max(-1, keepdims=True))
    weights = jnp.exp(logits - top)
    summed = _sum(weights.reshape(batch, k.shape[1], -1, k.shape[2]), v)
    return Partial(summed.reshape(batch, heads, length, -1), weights.sum(-1, keepdims=True), top)


def merged(one: Partial, other: Partial) -> Float[Array, "B N T H"]:
    """Attention over the keys of both parts."""
    top = jnp.maximum(one.top, other.top)
    one_scale, other_scale = jnp.exp(one.top - top), jnp.exp(other.top - top)
    total = one.total * one_scale + other.total * other_scale
    return (one.summed * one_scale + other.summed * other_scale) / total


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
