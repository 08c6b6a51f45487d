"""Attention of the completions of a prompt to the prompt, held once, and to themselves, by any backend (pure).

In plain JAX the two parts are kept apart. A fused kernel is given each completion as a row of its own that continues its prompt:
keys, which grouped queries make small, are repeated for it; logits are never held.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import CausalMask, SegmentIds
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Shaped

from sif_jax.ops.attention import Partial, head_major, merged, partial_attention
from sif_jax.ops.attention_backends import (
    CUDNN_MULTIPLE,
    LANES,
    Backend,
    padded,
    round_up,
    splash_block,
    splash_kernel,
)
from sif_jax.parallel.partition import num_shards, partition

Kernel = Callable[[Array, Array, Array, Array], Array]


def group_attention(
    q: Shaped[Array, "P M T N H"],
    prefix_k: Shaped[Array, "P K S H"],
    prefix_v: Shaped[Array, "P K S H"],
    prefix_mask: Bool[Array, "P S"],
    k: Shaped[Array, "P M K T H"],
    v: Shaped[Array, "P M K T H"],
    *,
    backend: Backend,
) -> Shaped[Array, "P M T N H"]:
    """Each of the M samples of a prompt attends to what the mask shows of the prompt, and to its own tokens up to each.

    On a mesh each device takes its share of the prompts, or else of every prompt's samples, and of the heads.
    """
    arrays = q, prefix_k, prefix_v, prefix_mask, k, v
    if backend not in KERNELS:
        return _xla(*arrays)
    attend = partial(_as_rows, KERNELS[backend])
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return attend(*arrays)
    names = ("batch", None) if q.shape[0] % num_shards(mesh, "batch") == 0 else (None, "batch")
    own = partition(mesh, (*names, "attention", None, None), k.shape)
    heads = own[2]
    prefix = PartitionSpec(own[0], heads, None, None)
    queries = PartitionSpec(own[0], own[1], None, heads, None)
    return jax.shard_map(
        attend,
        in_specs=(queries, prefix, prefix, PartitionSpec(own[0], None), own, own),
        out_specs=queries,
        check_vma=False,
    )(*arrays)


def _xla(q: Array, prefix_k: Array, prefix_v: Array, prefix_mask: Array, k: Array, v: Array) -> Array:
    """The two parts are merged by log-sum-exp, so the result equals attention over the concatenated sequence."""
    prompts, samples, length, heads, dim = q.shape
    shared = partial_attention(
        q.reshape(prompts, samples * length, heads, dim), prefix_k, prefix_v, prefix_mask[:, None]
    )
    own_k, own_v = (x.reshape(prompts * samples, *x.shape[2:]) for x in (k, v))
    causal = jnp.tril(jnp.ones((length, length), bool))
    own = partial_attention(q.reshape(prompts * samples, length, heads, dim), own_k, own_v, causal[None])

    def per_sample(x: Array) -> Array:
        x = x.reshape(prompts, heads, samples, length, x.shape[-1])
        return x.swapaxes(1, 2).reshape(prompts * samples, heads, length, x.shape[-1])

    out = merged(Partial(*map(per_sample, shared)), own)
    return out.swapaxes(1, 2).reshape(q.shape).astype(v.dtype)


def _as_rows(
    kernel: Kernel, q: Array, prefix_k: Array, prefix_v: Array, prefix_mask: Array, k: Array, v: Array
) -> Array:
    prompts, samples = q.shape[:2]

    def rows(x: Array) -> Array:
        return x.reshape(prompts * samples, *x.shape[2:])

    def repeated(x: Array) -> Array:
        return rows(jnp.broadcast_to(x[:, None], (prompts, samples, *x.shape[1:])))

    keys, values = (jnp.concatenate([repeated(a), rows(b)], axis=2) for a, b in ((prefix_k, k), (prefix_v, v)))
    visible = jnp.concatenate([repeated(prefix_mask), jnp.ones((prompts * samples, q.shape[2]), bool)], axis=1)
    return kernel(rows(q), keys, values, visible).reshape(q.shape)


def _splash(
    q: Shaped[Array, "R T N H"], k: Shaped[Array, "R K U H"], v: Shaped[Array, "R K U H"], visible: Bool[Array, "R U"]
) -> Shaped[Array, "R T N H"]:
    """The last T of U keys are the queries' own. Hidden keys are a segment that no query is of."""
    (rows, length, _, dim), total = q.shape, k.shape[2]
    blocks = splash_block(length), splash_block(total)
    long, longer, wide = round_up(length, blocks[0]), round_up(total, blocks[1]), round_up(dim, LANES)
    queries = padded(head_major(q) * dim**-0.5, long, wide)
    segments = SegmentIds(jnp.ones((rows, long), jnp.int32), _hidden_beyond(visible, longer).astype(jnp.int32))
    causal = partial(CausalMask, offset=total - length)
    out = splash_kernel(queries, padded(k, longer, wide), padded(v, longer, wide), segments, causal, blocks)
    return head_major(out[:, :, :length, :dim])


def _cudnn(q: Array, k: Array, v: Array, visible: Array) -> Array:
    """Its own causal mask starts with the first key, so the whole mask is given."""
    (_, length, _, dim), total = q.shape, k.shape[2]
    long, longer, wide = (round_up(size, CUDNN_MULTIPLE) for size in (length, total, dim))
    past = jnp.arange(long)[:, None] + total - length >= jnp.arange(longer)[None]
    out = jax.nn.dot_product_attention(
        head_major(padded(head_major(q), long, wide)),
        head_major(padded(k, longer, wide)),
        head_major(padded(v, longer, wide)),
        mask=(past[None] & _hidden_beyond(visible, longer)[:, None])[:, None],
        scale=dim**-0.5,
        implementation="cudnn",
    )
    return out[:, :length, :, :dim]


KERNELS: dict[Backend, Kernel] = {"splash": _splash, "cudnn": _cudnn}


def _hidden_beyond(visible: Bool[Array, "R U"], length: int) -> Bool[Array, "R V"]:
    return jnp.pad(visible, [(0, 0), (0, length - visible.shape[1])])
