"""Prompts with what was sampled for them, as the learner takes them: cut, laid on the mesh, in micro-batches (io)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int, Shaped

from sif_jax.config import GrpoConfig
from sif_jax.models.qwen2_5_vl.model import Batch
from sif_jax.ops.packing import Packing, lanes, pack
from sif_jax.parallel.partition import constrain, num_shards, sharding
from sif_jax.parallel.placement import put, put_groups, split_by_prompts
from sif_jax.rollout.engine import Rollout


class Completions(NamedTuple):
    """Prompts with what was sampled for them."""

    batch: Batch
    features: Shaped[Array, "P I D"] | None  # None: the vision tower learns too
    ids: Int[Array, "P M T"]
    logprobs: Float[Array, "P M T"]  # the sampler's
    token_mask: Bool[Array, "P M T"]

    def on_mesh(self, mesh: Mesh, *, by_prompts: bool) -> Completions:
        sampled = (put_groups(x, mesh, by_prompts=by_prompts) for x in (self.ids, self.logprobs, self.token_mask))
        return Completions(self.batch, self.features, *sampled)


class Groups(NamedTuple):
    """Completions, ready to learn from."""

    completions: Completions
    reference_logprobs: Float[Array, "P M T"] | None  # None: no KL
    advantages: Float[Array, "P M"]
    valid: Bool[Array, "P M"]


def to_learn(batch: Batch, features: Array, rollout: Rollout, config: GrpoConfig) -> Completions:
    """Cut the rollout to the shortest of T, T/2, T/4 that holds every completion, so that few programs are compiled."""
    longest = int(rollout.lengths.max())
    length = min(size for size in (config.max_new_tokens // part for part in (4, 2, 1)) if size >= longest)
    return Completions(
        batch,
        features if config.freeze_vision else None,
        rollout.ids[..., :length],
        rollout.logprobs[..., :length],
        jnp.arange(length)[None, None] < rollout.lengths[..., None],
    )


def pack_completions(
    lengths: Int[np.ndarray, "P M"], length: int, config: GrpoConfig, mesh: Mesh
) -> list[Packing | None]:
    """Of each micro-batch of `split_rows`, with completions padded to `length`: where their tokens stand without padding."""
    count, devices = len(lengths) // config.micro_batch, num_shards(mesh, "batch")
    if not config.remove_padding:
        return [None] * count
    by_prompts = split_by_prompts(config.micro_batch, config.num_samples, mesh)
    parts = lengths.reshape(devices if by_prompts else 1, count, -1, config.num_samples).swapaxes(0, 1)
    masks = np.arange(length) < parts.reshape(count, config.micro_batch, -1, 1)
    return [
        packed and Packing(*(put(x, sharding(mesh, ("batch", None), x.shape)) for x in packed))
        for packed in (pack(lanes(mask, devices)) for mask in masks)
    ]


def share_of_padding(completions: Completions, packings: Sequence[Packing | None], tokens: int) -> float:
    """Of the completion tokens that the learner computes, with `tokens` of them in completions."""
    padded = completions.ids.size // len(packings)
    return 1 - tokens / sum(padded if packing is None else packing.slots.size for packing in packings)


def split_rows(tree: Any, rows: int) -> list[Any]:
    """Micro-batches of `rows` prompts; on a mesh each takes its share of every device's prompts, so that none moves."""
    count = len(jax.tree.leaves(tree)[0]) // rows
    return [tree] if count == 1 else [_lying_as(tree, _part(tree, number, count)) for number in range(count)]


def _lying_as(whole: Any, part: Any) -> Any:
    """Samples that are split over the devices stay so; too few rows for it are whole on every device."""

    def place(x: Any, y: Any) -> Any:
        if not isinstance(x, jax.Array):
            return y
        where = x.sharding
        if isinstance(where, NamedSharding) and len(y) % _parts_of_rows(where):
            where = NamedSharding(where.mesh, PartitionSpec())
        return jax.device_put(y, where)

    return jax.tree.map(place, whole, part)


def _parts_of_rows(where: NamedSharding) -> int:
    split = where.spec[0] if len(where.spec) else None
    names = (split,) if isinstance(split, str) else split or ()
    return math.prod(where.mesh.shape[name] for name in names)


@partial(jax.jit, static_argnames="count")
def _part(tree: Any, number: Int[Array, ""] | int, count: int) -> Any:
    def take(x: Array) -> Array:
        rows = len(x) // count
        shares = x.reshape(_shares(rows), count, -1, *x.shape[1:])
        part = jax.lax.dynamic_index_in_dim(shares, number, axis=1, keepdims=False)
        return constrain(part.reshape(rows, *x.shape[1:]), "batch")

    return jax.tree.map(take, tree)


def join_rows(parts: Sequence[Shaped[Array, "_ *rest"]]) -> Shaped[Array, "P *rest"]:
    """The inverse of `split_rows`."""
    rows, *rest = parts[0].shape
    shares = jnp.stack([part.reshape(_shares(rows), -1, *rest) for part in parts], axis=1)
    return shares.reshape(-1, *rest)


def _shares(rows: int) -> int:
    shards = num_shards(jax.sharding.get_abstract_mesh(), "batch")
    return shards if rows % shards == 0 else 1
