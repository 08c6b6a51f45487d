"""Attention in plain JAX, some queries of one key head at a time, whose weights are computed again for the gradient
(FlashAttention, arXiv:2205.14135): what a CPU wants, whose caches hold such a block (pure).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int, Shaped

from sif_jax.ops.attention import MASKED
from sif_jax.ops.scan import ATTENTION

BLOCK_BYTES = 2 * 2**20  # of the float32 weights that are at hand at once
MIN_QUERIES, MAX_BLOCKS = 128, 16  # products stay large, programs small


class Block(NamedTuple):
    """Some queries, the keys that they may see, and which of them they see."""

    own: slice
    seen: slice
    mask: Bool[Array, "1 C S"]


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def flash_attention(
    q: Shaped[Array, "B N T H"],
    k: Shaped[Array, "B K T H"],
    v: Shaped[Array, "B K T H"],
    segments: Int[Array, "B T"],
    causal: bool,
    packed: bool,
) -> Shaped[Array, "B N T H"]:
    """softmax(q kᵀ) v over what a position sees; query head n reads key head n // (N/K).

    That is its own segment or, not `packed`, the row; with `causal` up to its own position.
    """
    return _forward(q, k, v, segments, causal, packed)[0]


def _forward(q: Array, k: Array, v: Array, segments: Array, causal: bool, packed: bool) -> tuple[Array, Any]:
    """Kept for the gradient: the inputs, the output, and log Σ exp of each query's logits."""

    def attend(blocks: Sequence[Block], q: Array, k: Array, v: Array) -> tuple[Array, Array]:
        outs, norms = [], []
        for own, seen, mask in blocks:
            logits = jnp.where(mask, _product("gth,sh->gts", q[:, own], k[seen]), MASKED)
            top = logits.max(-1, keepdims=True)
            weights = jnp.exp(logits - top)
            total = weights.sum(-1, keepdims=True)
            outs.append(_product("gts,sh->gth", weights.astype(v.dtype), v[seen]) / total)
            norms.append(top + jnp.log(total))
        return jnp.concatenate(outs, axis=1).astype(v.dtype), jnp.concatenate(norms, axis=1)

    out, norm = _by_key_head(attend, segments, causal, packed, _grouped(q, k), k, v)
    out, norm = checkpoint_name(out.reshape(q.shape), ATTENTION), checkpoint_name(norm, ATTENTION)
    return out, (q, k, v, segments, out, norm)


def _backward(causal: bool, packed: bool, kept: Any, cotangent: Array) -> tuple[Array, Array, Array, None]:
    q, k, v, segments, out, norm = kept
    along = _grouped(jnp.sum(cotangent.astype(jnp.float32) * out, axis=-1, keepdims=True), k)

    def pull(
        blocks: Sequence[Block], q: Array, k: Array, v: Array, cotangent: Array, norm: Array, along: Array
    ) -> tuple[Array, Array, Array]:
        by_q, by_k, by_v = [], jnp.zeros(k.T.shape, jnp.float32), jnp.zeros(v.T.shape, jnp.float32)
        for own, seen, mask in blocks:
            logits = _product("gth,sh->gts", q[:, own], k[seen])
            weights = jnp.where(mask, jnp.exp(logits - norm[:, own]), 0.0)
            by_weights = _product("gth,sh->gts", cotangent[:, own], v[seen])
            by_logits = (weights * (by_weights - along[:, own])).astype(q.dtype)
            by_q.append(_product("gts,sh->gth", by_logits, k[seen]))
            # Across, so that what XLA copies for a product is the narrow side of it.
            by_k = by_k.at[:, seen].add(_product("gth,gts->hs", q[:, own], by_logits))
            by_v = by_v.at[:, seen].add(_product("gth,gts->hs", cotangent[:, own], weights.astype(v.dtype)))
        return jnp.concatenate(by_q, axis=1).astype(q.dtype), by_k.T.astype(k.dtype), by_v.T.astype(v.dtype)

    arrays = _grouped(q, k), k, v, _grouped(cotangent, k), norm, along
    by_q, by_k, by_v = _by_key_head(pull, segments, causal, packed, *arrays)
    return by_q.reshape(q.shape), by_k, by_v, None


flash_attention.defvjp(_forward, _backward)


def _by_key_head(
    function: Callable[..., Any],
    segments: Int[Array, "B T"],
    causal: bool,
    packed: bool,
    q: Shaped[Array, "B K G T H"],
    *others: Shaped[Array, "B K ..."],
) -> Any:
    """The function of a row's blocks and of the arrays of one key head: of several heads and rows at a time if they are short."""
    _, keys, groups, length, _ = q.shape
    size = 4 * groups * length**2

    def row(segments: Int[Array, " T"], *arrays: Shaped[Array, "K ..."]) -> Any:
        # Outside the loop over heads, and so an array: XLA would compute a mask anew wherever it is read.
        blocks = _blocks(segments, causal, packed, size)
        return _at_a_time(BLOCK_BYTES // size, partial(function, blocks), *arrays)

    return _at_a_time(BLOCK_BYTES // (keys * size), row, segments, q, *others)


def _at_a_time(count: int, function: Callable[..., Any], *arrays: Shaped[Array, "I ..."]) -> Any:
    if len(arrays[0]) <= count:
        return jax.vmap(function)(*arrays)
    return jax.lax.map(lambda each: function(*each), arrays, batch_size=count if count > 1 else None)


def _blocks(segments: Int[Array, " T"], causal: bool, packed: bool, size: int) -> list[Block]:
    """`size` is that of all weights of a key head, in bytes."""
    length = len(segments)
    count = max(min(-(-size // BLOCK_BYTES), length // MIN_QUERIES, MAX_BLOCKS), 1)
    blocks = []
    for begin, end in itertools.pairwise(length * block // count for block in range(count + 1)):
        own, seen = slice(begin, end), slice(0, end if causal else length)
        mask = jnp.arange(begin, end)[:, None] >= jnp.arange(seen.stop)[None]
        mask = mask if causal else jnp.ones_like(mask)
        if packed:
            mask &= segments[own, None] == segments[None, seen]
        blocks.append(Block(own, seen, mask[None]))
    return blocks


def _grouped(x: Shaped[Array, "B N T *rest"], k: Shaped[Array, "B K T H"]) -> Shaped[Array, "B K G T *rest"]:
    return x.reshape(*k.shape[:2], -1, *x.shape[2:])


def _product(axes: str, a: Array, b: Array) -> Float[Array, "..."]:
    return jnp.einsum(axes, a, b, preferred_element_type=jnp.float32)
