"""Sample N completions of every prompt on the device, computing and holding each prompt once (pure)."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key, Shaped

from sif_jax.models.qwen2_5_vl.decoder import Cache, Prefix
from sif_jax.models.qwen2_5_vl.model import Batch, Qwen2_5_VL
from sif_jax.rollout.sampling import Sampling, choose

FIRST_CACHE = 64  # tokens


class Rollout(NamedTuple):
    """Completions of P prompts × M samples; the token that stops a sample is its last one."""

    ids: Int[Array, "P M T"]  # pad_id after the end
    logprobs: Float[Array, "P M T"]  # 0 after the end
    lengths: Int[Array, "P M"]  # number of tokens, the stop token included
    finished: Bool[Array, "P M"]  # False: cut at max_new_tokens


class _Loop(NamedTuple):
    position: Int[Array, ""]
    logits: Float[Array, "P M V"]
    cache: Cache
    rollout: Rollout


@partial(jax.jit, static_argnames="graphdef")
def encode_images(graphdef: nnx.GraphDef, states: tuple[nnx.State, ...], batch: Batch) -> Shaped[Array, "P I D"]:
    """Image features of a prompt batch, to be reused while the vision tower does not change."""
    return nnx.merge(graphdef, *states).image_features(batch)


def next_positions(batch: Batch) -> Int[Array, "P"]:
    """The M-RoPE position of each prompt's first new token: one past the largest of the prompt."""
    return jnp.max(jnp.where((batch["segments"] > 0)[..., None], batch["positions"], -1), axis=(1, 2)) + 1


@partial(jax.jit, static_argnames=("graphdef", "sampling", "pad_id"))
def generate(
    graphdef: nnx.GraphDef,
    states: tuple[nnx.State, ...],
    batch: Batch,
    features: Shaped[Array, "P I D"],
    keys: Key[Array, "P M"],
    *,
    sampling: Sampling,
    pad_id: int,
) -> Rollout:
    """Continue each prompt of a batch (one prompt per row, padded on the right) M times."""
    model: Qwen2_5_VL = nnx.merge(graphdef, *states)
    prompts, samples = keys.shape
    logits, prefix = _prefill(model, batch, features)
    start = next_positions(batch)
    shape = (prompts, samples, sampling.max_new_tokens)
    loop = _Loop(
        position=jnp.int32(0),
        logits=jnp.broadcast_to(logits[:, None], (prompts, samples, logits.shape[-1])),
        cache=model.decoder.empty_cache(prompts, samples, model.compute_dtype),
        rollout=Rollout(
            jnp.full(shape, pad_id, jnp.int32),
            jnp.zeros(shape, jnp.float32),
            jnp.zeros(shape[:2], jnp.int32),
            jnp.zeros(shape[:2], bool),
        ),
    )

    def going(loop: _Loop) -> Bool[Array, ""]:
        return (loop.position < loop.cache.length) & ~loop.rollout.finished.all()

    def step(loop: _Loop) -> _Loop:
        tokens, logprobs = choose(loop.logits, keys, loop.position, sampling)
        rollout = _append(loop.rollout, loop.position, tokens, logprobs, sampling, pad_id)
        logits, cache = _next_logits(model, tokens, start + loop.position, prefix, loop.cache, loop.position)
        return _Loop(loop.position + 1, logits, cache, rollout)

    for length in _cache_lengths(sampling.max_new_tokens):
        loop = jax.lax.while_loop(going, step, loop._replace(cache=loop.cache.grow(length)))
    return loop.rollout


def _cache_lengths(longest: int) -> list[int]:
    """Doubling, so that early tokens do not read a cache that is mostly empty."""
    lengths = [min(FIRST_CACHE, longest)]
    while lengths[-1] < longest:
        lengths.append(min(2 * lengths[-1], longest))
    return lengths


def _prefill(model: Qwen2_5_VL, batch: Batch, features: Array) -> tuple[Float[Array, "P V"], Prefix]:
    """Logits after the last token of each prompt, and the prompts' keys and values."""
    hidden, prefix = model.decoder.prefill(model.embed_prompt(batch, features), batch["positions"], batch["segments"])
    last = (batch["segments"] > 0).sum(-1) - 1
    return model.logits(jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0]), prefix


def _append(
    rollout: Rollout, position: Array, tokens: Array, logprobs: Array, sampling: Sampling, pad_id: int
) -> Rollout:
    live = ~rollout.finished
    stop = jnp.isin(tokens, jnp.asarray(sampling.stop_ids, jnp.int32))
    at = (0, 0, position)
    return Rollout(
        jax.lax.dynamic_update_slice(rollout.ids, jnp.where(live, tokens, pad_id)[..., None], at),
        jax.lax.dynamic_update_slice(rollout.logprobs, jnp.where(live, logprobs, 0.0)[..., None], at),
        rollout.lengths + live,
        rollout.finished | stop,
    )


def _next_logits(
    model: Qwen2_5_VL,
    tokens: Int[Array, "P M"],
    positions: Int[Array, "P"],
    prefix: Prefix,
    cache: Cache,
    index: Int[Array, ""],
) -> tuple[Float[Array, "P M V"], Cache]:
    where = jnp.broadcast_to(positions[:, None, None], (*tokens.shape, 3))
    hidden, cache = model.decoder.decode_step(model.embed(tokens), where, prefix, cache, index)
    return model.logits(hidden), cache
