"""Self-attention over packed rows in plain JAX (`xla`, and `flash` for a CPU), by Splash (TPU) or by cuDNN (GPU) (pure).

Position t sees the positions of its own segment, with `causal` those up to t only. Padding (segment 0) sees padding, so that
no row of a softmax is empty.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from typing import Literal, cast

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import (
    BlockSizes,
    CausalMask,
    FullMask,
    MultiHeadMask,
    SegmentIds,
    make_splash_mha,
)
from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_mask import Mask
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Int, Shaped

from sif_jax.ops.attention import attention, head_major, segment_mask
from sif_jax.ops.flash_attention import flash_attention
from sif_jax.parallel.partition import constrain, partition

Backend = Literal["xla", "flash", "splash", "cudnn"]

# The float32 logits of one row that XLA may hold at once; a longer row is computed some queries at a time. It counts one
# row, not the batch, because rows are spread over devices.
LOGITS_BYTES = 128 * 2**20
CAUSAL_PARTS, CAUSAL_QUERIES = 4, 128  # of a short row, at most and at least: 5/8 of the products, which stay large
SPLASH_BLOCK = 512
QUERY = ("batch", None, "attention", None)
KEY = ("batch", "attention", None, None)
LANES = 128  # of a TPU register: blocks and heads are padded to multiples of it
CUDNN_MULTIPLE = 8  # of the length, for the alignment of the mask, and of the head


def self_attention(
    q: Shaped[Array, "B T N H"],
    k: Shaped[Array, "B K T H"],
    v: Shaped[Array, "B K T H"],
    segments: Int[Array, "B T"],
    *,
    causal: bool,
    backend: Backend,
    packed: bool = True,
) -> Shaped[Array, "B T N H"]:
    """softmax(q kᵀ / √H) v over what a position sees; query head n reads key head n // (N/K).

    `packed` false promises one segment a row, and padding after it: a causal kernel then needs no segments. What padding sees
    is left open.

    On a mesh the devices share the heads, those of `sequence` too: each has the whole row of its heads.
    """
    q, k, v = constrain(q, *QUERY), constrain(k, *KEY), constrain(v, *KEY)
    return constrain(
        BACKENDS[backend](q, k, v, constrain(segments, "batch", None), causal, packed or not causal), *QUERY
    )


def _xla(q: Array, k: Array, v: Array, segments: Array, causal: bool, packed: bool) -> Array:
    """A few products for a short row, of causal queries each with the keys up to its last; for a long one a loop over chunks
    of queries, computed again in the backward pass."""
    batch, length, heads, _ = q.shape
    index = jnp.arange(length)
    count = _ceil(4 * heads * length**2, LOGITS_BYTES)
    if count <= 1:
        parts = causal_parts(length) if causal else 1
        bounds = [length * part // parts for part in range(parts + 1)]
        outs = [
            attention(
                q[:, begin:end],
                k[:, :, :end],
                v[:, :, :end],
                _visible(segments[:, begin:end], index[begin:end], segments[:, :end], causal),
            )
            for begin, end in itertools.pairwise(bounds)
        ]
        return jnp.concatenate(outs, axis=1)

    @partial(jax.checkpoint, prevent_cse=False)
    def attend(part):
        q, own, index = part
        return attention(q, k, v, _visible(own, index, segments, causal))

    size = _ceil(length, count)
    rest = size * count - length
    q, own = _lengthened(q, rest), _lengthened(segments, rest)
    chunks = (x.reshape(batch, count, size, *x.shape[2:]).swapaxes(0, 1) for x in (q, own))
    out = jax.lax.map(attend, (*chunks, jnp.arange(size * count).reshape(count, size)))
    return out.swapaxes(0, 1).reshape(q.shape)[:, :length]


def causal_parts(length: int) -> int:
    """Into how many parts the queries of a short causal row are cut."""
    return max(min(CAUSAL_PARTS, length // CAUSAL_QUERIES), 1)


def _visible(
    own: Int[Array, "B C"], index: Int[Array, " C"], segments: Int[Array, "B T"], causal: bool
) -> Bool[Array, "B C T"]:
    same = own[:, :, None] == segments[:, None, :]
    past = index[None, :, None] >= jnp.arange(segments.shape[1])[None, None]
    return same & past if causal else same


def _flash(q: Array, k: Array, v: Array, segments: Array, causal: bool, packed: bool) -> Array:
    def rows(q: Array, k: Array, v: Array, segments: Array) -> Array:
        return flash_attention(q, k, v, segments, causal, packed)

    return head_major(_on_each_device(rows, k.shape)(head_major(q) * q.shape[-1] ** -0.5, k, v, segments))


def _splash(q: Array, k: Array, v: Array, segments: Array, causal: bool, packed: bool) -> Array:
    length, dim = q.shape[1], q.shape[3]
    block = splash_block(length)
    q, k, v, segments = _padded(q, k, v, segments, round_up(length, block), round_up(dim, LANES))
    mask = CausalMask if causal else FullMask

    def rows(q: Array, k: Array, v: Array, segments: Array) -> Array:
        return splash_kernel(q, k, v, SegmentIds(segments, segments), mask, (block, block))

    out = _on_each_device(rows, k.shape)(head_major(q) * dim**-0.5, k, v, segments)
    return head_major(out)[:, :length, :, :dim]


def splash_block(length: int) -> int:
    """As few blocks as may be, of equal size."""
    return round_up(_ceil(length, _ceil(length, SPLASH_BLOCK)), LANES)


def splash_kernel(
    q: Shaped[Array, "B N T H"],
    k: Shaped[Array, "B K S H"],
    v: Shaped[Array, "B K S H"],
    segments: SegmentIds,
    mask: Callable[[tuple[int, int]], Mask],
    blocks: tuple[int, int],
) -> Shaped[Array, "B N T H"]:
    """The Pallas kernel of JAX's TPU library, on whole blocks of queries and keys; off the TPU it is interpreted."""
    (_, heads, length, _), (block_q, block_kv) = q.shape, blocks
    sizes = BlockSizes(
        block_q=block_q,
        block_kv=block_kv,
        block_q_dkv=block_q,
        block_kv_dkv=block_kv,
        block_q_dq=block_q,
        block_kv_dq=block_kv,
    )
    masks = MultiHeadMask([mask((length, k.shape[2]))] * heads)

    def run(q: Array, k: Array, v: Array, segments: SegmentIds, *, interpret: bool) -> Array:
        kernel = make_splash_mha(masks, block_sizes=sizes, head_shards=1, q_seq_shards=1, interpret=interpret)
        return cast(Array, jax.vmap(kernel)(q, k, v, segments))

    compiled, interpreted = partial(run, interpret=False), partial(run, interpret=True)
    return jax.lax.platform_dependent(q, k, v, segments, tpu=compiled, default=interpreted)


def _on_each_device(rows: Callable[..., Array], keys: tuple[int, ...]) -> Callable[..., Array]:
    """XLA cannot split a Pallas kernel, nor a loop over rows and heads. Under `jax.set_mesh` each device runs it on its own;
    `keys` is [B, K, T, H].

    Rows or heads that do not divide are computed on every device; whatever divides the key heads divides the queries'.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return rows
    heads = partition(mesh, KEY, keys)
    return jax.shard_map(
        rows, in_specs=(heads, heads, heads, PartitionSpec(heads[0], None)), out_specs=heads, check_vma=False
    )


def _cudnn(q: Array, k: Array, v: Array, segments: Array, causal: bool, packed: bool) -> Array:
    """cuDNN's fused kernel. Segments are an explicit mask [B, 1, T, T], which slows it: its own packing may be ignored in
    silence."""
    length, dim = q.shape[1], q.shape[3]
    q, k, v, segments = _padded(q, k, v, segments, round_up(length, CUDNN_MULTIPLE), round_up(dim, CUDNN_MULTIPLE))
    out = jax.nn.dot_product_attention(
        q,
        head_major(k),
        head_major(v),
        mask=segment_mask(segments)[:, None] if packed else None,
        scale=dim**-0.5,
        is_causal=causal,
        implementation="cudnn",
    )
    return out[:, :length, :, :dim]


BACKENDS: dict[Backend, Callable[[Array, Array, Array, Array, bool, bool], Array]] = {
    "xla": _xla,
    "flash": _flash,
    "splash": _splash,
    "cudnn": _cudnn,
}


def _padded(q: Array, k: Array, v: Array, segments: Array, length: int, dim: int) -> tuple[Array, Array, Array, Array]:
    queries = head_major(padded(head_major(q), length, dim))
    return queries, padded(k, length, dim), padded(v, length, dim), _lengthened(segments, length - segments.shape[1])


def padded(x: Shaped[Array, "B K S H"], length: int, dim: int) -> Shaped[Array, "B K U W"]:
    """Longer rows and wider heads."""
    return jnp.pad(x, [(0, 0), (0, 0), (0, length - x.shape[2]), (0, dim - x.shape[3])])


def _lengthened(x: Shaped[Array, "B T *rest"], rest: int) -> Shaped[Array, "B U *rest"]:
    """With more positions: for segments a segment of their own, -1, which no other position sees."""
    return jnp.pad(x, [(0, 0), (0, rest)] + [(0, 0)] * (x.ndim - 2), constant_values=0 if x.ndim > 2 else -1)


def _ceil(a: int, b: int) -> int:
    return -(-a // b)


def round_up(size: int, multiple: int) -> int:
    return _ceil(size, multiple) * multiple
