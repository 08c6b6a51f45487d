"""The compiled programs of a rollout: prompts into the pool, tokens for the rows, rows into another order (pure).

A lane is a device's share of the work: its own prompts, rows and cache. All lanes run one program in step; arrays hold the rows
(or prompts) of lane 0, lane 1, … in one axis, which is split over the devices where there are several.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, Shaped

from sif_jax.models.qwen2_5_vl.config import TextConfig
from sif_jax.models.qwen2_5_vl.decoder import Cache, Prefix, RowPlaces
from sif_jax.models.qwen2_5_vl.layer_arrays import AnyState, merge_model
from sif_jax.models.qwen2_5_vl.model import Batch
from sif_jax.ops.attention import take_in_lanes
from sif_jax.ops.windows import take_rows
from sif_jax.parallel.partition import constrain, on_own_rows
from sif_jax.rollout.sampling import Sampling, choose
from sif_jax.rollout.schedule import Emitted, Rows, Spread

Layers = tuple[nnx.State, ...] | None  # each layer's weights as arrays of their own, or None: the stack of the states


class Pool(NamedTuple):
    """What decoding needs of the prompts: G slots per lane."""

    prefix: Prefix
    starts: Int[Array, "slots"]  # M-RoPE position of the first new token
    logits: Float[Array, "slots V"]  # after the prompt's last token


class _Loop(NamedTuple):
    step: Int[Array, ""]
    column: Int[Array, ""]  # last written
    tokens: Int[Array, "rows"]
    lengths: Int[Array, "rows"]
    live: Bool[Array, "rows"]
    cache: Cache
    emitted_tokens: Int[Array, "rows column"]
    emitted_logprobs: Float[Array, "rows column"]


@partial(jax.jit, static_argnames="graphdef")
def encode_images(graphdef: nnx.GraphDef, states: tuple[AnyState, ...], batch: Batch) -> Shaped[Array, "P I D"]:
    """Image features of a prompt batch, to be reused while the vision tower does not change."""
    model = merge_model(graphdef, *states)
    rows, patches = batch["patches"].shape[:2]
    if not patches:
        return jnp.zeros((rows, 0, model.config.text.hidden_size), model.compute_dtype)
    return model.image_features(batch)


def next_positions(batch: Batch) -> Int[Array, "P"]:
    """The M-RoPE position of each prompt's first new token: one past the largest of the prompt."""
    return jnp.max(jnp.where((batch["segments"] > 0)[..., None], batch["positions"], -1), axis=(1, 2)) + 1


@partial(jax.jit, static_argnames=("config", "slots", "length", "dtype", "separate"))
def empty_pool(config: TextConfig, slots: int, length: int, dtype: DTypeLike, *, separate: bool) -> Pool:
    """Room for `slots` prompts (of all lanes) of `length` tokens."""
    cache = empty_cache(config, slots, length, dtype, separate=separate)
    prefix = Prefix(cache.k, cache.v, constrain(jnp.zeros((slots, length), bool), "batch"))
    logits = constrain(jnp.zeros((slots, config.vocab_size), jnp.float32), "batch", "vocab")
    return Pool(prefix, constrain(jnp.zeros(slots, jnp.int32), "batch"), logits)


@partial(jax.jit, static_argnames=("config", "rows", "length", "dtype", "separate"))
def empty_cache(config: TextConfig, rows: int, length: int, dtype: DTypeLike, *, separate: bool) -> Cache:
    """A ring of `length` columns for the rows of all lanes."""
    layers, shape = config.num_hidden_layers, (rows, config.num_key_value_heads, length, config.head_dim)

    def zeros() -> Any:
        if separate:
            return tuple(constrain(jnp.zeros(shape, dtype), "batch", "kv_heads") for _ in range(layers))
        return constrain(jnp.zeros((layers, *shape), dtype), None, "batch", "kv_heads")

    return Cache(zeros(), zeros())


@partial(jax.jit, static_argnames=("graphdef", "spread"), donate_argnames="pool")
def prefill(
    graphdef: nnx.GraphDef,
    states: tuple[AnyState, ...],
    pool: Pool,
    batch: Batch,
    features: Shaped[Array, "P I D"],
    slots: Int[Array, "lane F"],
    *,
    spread: Spread,
) -> Pool:
    """Compute prompts (one per row, padded on the right) once, and write each into its slot of its lane; slot G: nowhere.

    The rows of `batch` are those of lane 0, lane 1, …; or, where lanes share out samples, of every lane.
    """
    model = merge_model(graphdef, *states)
    hidden, k, v = model.decoder.prefill(model.embed_prompt(batch, features), batch["positions"], batch["segments"])
    real = batch["segments"] > 0
    last = take_rows(hidden, real.sum(-1, keepdims=True) - 1)[:, 0]
    lanes, each = slots.shape

    def by_lane(x: Array) -> Array:
        if spread == "prompts":
            return x.reshape(lanes, each, *x.shape[1:])
        return jnp.broadcast_to(x[None], (lanes, *x.shape))

    def put(held: Array, new: Array) -> Array:
        """Of any array that has the prompts' axis first; a shorter prompt is filled up."""
        room = [(0, full - size) for full, size in zip(held.shape[1:], new.shape[1:])]
        new = by_lane(jnp.pad(new, [(0, 0), *room])).astype(held.dtype)
        put_in = jax.vmap(lambda held, new, slots: held.at[slots].set(new, mode="drop"))
        return on_own_rows(put_in, held.reshape(lanes, -1, *held.shape[1:]), new, slots).reshape(held.shape)

    def put_stack(held: Any, new: Shaped[Array, "layer P *rest"]) -> Any:
        if isinstance(held, tuple):
            return tuple(put(one, new[layer]) for layer, one in enumerate(held))
        return jax.vmap(put)(held, new)

    prefix = Prefix(put_stack(pool.prefix.k, k), put_stack(pool.prefix.v, v), put(pool.prefix.mask, real))
    return Pool(prefix, put(pool.starts, next_positions(batch)), put(pool.logits, model.logits(last)))


@partial(jax.jit, static_argnames=("graphdef", "sampling", "max_steps"), donate_argnames="cache")
def decode(
    graphdef: nnx.GraphDef,
    states: tuple[AnyState, ...],
    layers: Layers,
    pool: Pool,
    cache: Cache,
    column: Int[Array, ""],
    rows: Rows,
    *,
    sampling: Sampling,
    max_steps: int,
) -> tuple[Cache, Emitted]:
    """Choose tokens for every live row until `max_steps`, or until the host has something to do: see `Rows`.

    `column` of the ring was the last one written.
    """
    model = merge_model(graphdef, *states)
    keys, width, lanes = jax.random.wrap_key_data(rows.keys), ring_length(cache), len(rows.patience)
    fresh, occupied = (rows.lengths == 0) & (rows.limits > 0), rows.limits > 0
    starts, stop_ids = take_in_lanes(pool.starts, rows.slots), jnp.asarray(sampling.stop_ids, jnp.int32)

    def alive(tokens: Array, lengths: Array) -> Bool[Array, "rows"]:
        return (lengths < rows.limits) & ~jnp.isin(tokens, stop_ids)

    def first() -> tuple[Array, Array]:
        return choose(take_in_lanes(pool.logits, rows.slots), keys, jnp.zeros_like(rows.lengths), sampling)

    none = rows.tokens, jnp.zeros(rows.tokens.shape, jnp.float32)
    tokens, logprobs = jax.lax.cond(fresh.any(), first, lambda: none)
    tokens, lengths = jnp.where(fresh, tokens, rows.tokens), rows.lengths + fresh
    shape = (len(tokens), 1 + max_steps)
    loop = _Loop(
        jnp.int32(0),
        column,
        tokens,
        lengths,
        occupied & alive(tokens, lengths),
        cache,
        jnp.zeros(shape, jnp.int32).at[:, 0].set(tokens),
        jnp.zeros(shape, jnp.float32).at[:, 0].set(logprobs),
    )

    def going(loop: _Loop) -> Bool[Array, ""]:
        live, ended = (x.reshape(lanes, -1).sum(-1) for x in (loop.live, occupied & ~loop.live))
        return (loop.step < max_steps) & jnp.all(ended < rows.patience) & (live.max() > rows.shrink_at)

    def step(loop: _Loop) -> _Loop:
        column = (loop.column + 1) % width
        age = (column - jnp.arange(width)) % width
        places = RowPlaces(rows.members, rows.place, column, age[None] < loop.lengths[:, None])
        positions = starts + loop.lengths - 1
        hidden, cache = model.decoder.decode_step(
            model.embed(loop.tokens), positions, pool.prefix, loop.cache, places, layers
        )
        tokens, logprobs = choose(model.logits(hidden), keys, loop.lengths, sampling)
        tokens = jnp.where(loop.live, tokens, loop.tokens)
        lengths, at = loop.lengths + loop.live, (0, 1 + loop.step)
        return _Loop(
            loop.step + 1,
            column,
            tokens,
            lengths,
            loop.live & alive(tokens, lengths),
            cache,
            jax.lax.dynamic_update_slice(loop.emitted_tokens, tokens[:, None], at),
            jax.lax.dynamic_update_slice(loop.emitted_logprobs, logprobs[:, None], at),
        )

    loop = jax.lax.while_loop(going, step, loop)
    tokens, logprobs, lengths = loop.emitted_tokens, loop.emitted_logprobs, loop.lengths
    whole = constrain(tokens, None, None), constrain(logprobs, None, None), constrain(lengths, None)
    return loop.cache, Emitted(*whole, loop.step)  # on every process


@partial(jax.jit, static_argnames="length")
def rearrange(cache: Cache, source: Int[Array, "lane R"], column: Int[Array, ""], *, length: int) -> Cache:
    """A cache of these rows of each lane in this order, its ring `length` columns long, the last one written at
    `last_column`.

    A row that is not in the old cache may be any; of a shorter ring the newest columns are kept.
    """
    width = ring_length(cache)
    ages = (last_column(width, length) - jnp.arange(length)) % length
    columns = (column - ages) % width

    def moved(held: Array) -> Array:
        return take_in_lanes(held, source)[..., columns, :]

    return jax.tree.map(moved if isinstance(cache.k, tuple) else jax.vmap(moved), cache)


def last_column(old_length: int, length: int) -> int:
    """Where the newest column of a ring lies after it was rearranged."""
    return min(old_length, length) - 1


@partial(jax.jit, static_argnames="length")
def lengthen(pool: Pool, *, length: int) -> Pool:
    """The same pool with room for prompts of `length` tokens."""
    room = length - pool_length(pool)

    def longer(x: Array) -> Array:
        return jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, room), (0, 0)])

    k, v = jax.tree.map(longer, (pool.prefix.k, pool.prefix.v))
    return pool._replace(prefix=Prefix(k, v, jnp.pad(pool.prefix.mask, [(0, 0), (0, room)])))


def pool_length(pool: Pool) -> int:
    return pool.prefix.mask.shape[-1]


def ring_length(cache: Cache) -> int:
    return jax.tree.leaves(cache)[0].shape[-2]
