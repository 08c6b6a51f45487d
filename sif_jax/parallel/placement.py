"""Put host arrays and states on the mesh: batches by rows, rollouts by prompts or by samples, the rest whole (io)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Key

from sif_jax.errors import InputError
from sif_jax.parallel.partition import Axes, num_shards, sharding

# What the axes of a batch's arrays are; the rest of each is whole.
BATCH_AXES: Mapping[str, Axes] = {
    "tokens": ("batch", "tokens"),
    "positions": ("batch", "tokens"),
    "segments": ("batch", "tokens"),
    "loss_mask": ("batch", "tokens"),
    "image_index": ("batch", "tokens"),
    "patches": ("batch", "patches"),
    "patch_positions": ("batch", "patches"),
    "patch_segments": ("batch", "patches"),
    "window_slot": ("batch", "patches"),
}


class Shard(NamedTuple):
    """Part `index` of `count` equal parts of a batch's rows: what one process holds on its host."""

    index: int = 0
    count: int = 1


WHOLE = Shard()


def put(array: np.ndarray | jax.Array, where: NamedSharding) -> jax.Array:
    """An array that every process holds, on all devices as `where` says."""
    if isinstance(array, jax.Array) and jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
        data = np.asarray(jax.random.key_data(array))
        spec = PartitionSpec(*where.spec, *(None,) * (array.ndim - len(where.spec) + 1))
        return jax.random.wrap_key_data(put(data, NamedSharding(where.mesh, spec)))
    if where.is_fully_addressable:
        return jax.device_put(array, where)
    whole = np.asarray(array)
    return jax.make_array_from_callback(whole.shape, where, whole.__getitem__)


def replicate(tree: Any, mesh: Mesh) -> Any:
    return jax.tree.map(lambda leaf: put(leaf, NamedSharding(mesh, PartitionSpec())), tree)


def check_rows(rows: int, mesh: Mesh | AbstractMesh, *, key: str = "batch_size") -> None:
    """
    Raises:
      InputError: the rows do not divide evenly.
    """
    shards = num_shards(mesh, "batch")
    if rows % shards:
        raise InputError(
            "rows do not divide over the devices",
            value=rows,
            expected=f"a multiple of {shards} (mesh.data x mesh.fsdp)",
            fix=f"change {key}, or move devices from mesh.data and mesh.fsdp to mesh.tensor or mesh.sequence",
        )


def shard_rows(batch: Mapping[str, np.ndarray], mesh: Mesh, shard: Shard = WHOLE) -> dict[str, jax.Array]:
    """Split the rows of a batch, and the tokens and patches of each row, over the devices; `batch` is this process's part.

    Raises:
      InputError: the rows do not divide evenly.
    """
    check_rows(len(batch["tokens"]) * shard.count, mesh)
    return {name: _put_rows(name, array, mesh, shard) for name, array in batch.items()}


def _put_rows(name: str, array: np.ndarray, mesh: Mesh, shard: Shard) -> jax.Array:
    axes, shape = BATCH_AXES.get(name, ("batch",)), (len(array) * shard.count, *array.shape[1:])
    where = sharding(mesh, (*axes, *(None,) * (array.ndim - len(axes))), shape)
    if shard.count == 1:
        return put(array, where)
    first = shard.index * len(array)

    def own(index: Any) -> np.ndarray:
        start, stop, _ = index[0].indices(shape[0])
        return array[(slice(start - first, stop - first), *index[1:])]

    return jax.make_array_from_callback(shape, where, own)


def split_by_prompts(prompts: int, samples: int, mesh: Mesh | AbstractMesh) -> bool:
    """Whether a rollout's prompts are split over the devices; where they are too few, the samples of every prompt are.

    Raises:
      InputError: neither divides evenly.
    """
    shards = num_shards(mesh, "batch")
    if prompts % shards and samples % shards:
        raise InputError(
            "neither prompts nor samples divide over the devices",
            value=f"{prompts} prompts, num_samples={samples}",
            expected=f"a multiple of {shards} (mesh.data x mesh.fsdp)",
            fix="change micro_batch and prompts_per_step, or num_samples",
        )
    return prompts % shards == 0


def shard_groups(
    batch: dict[str, np.ndarray],
    keys: Key[Array, "P M"],
    mesh: Mesh,
    *,
    by_prompts: bool | None = None,
    shard: Shard = WHOLE,
) -> tuple[dict[str, jax.Array], Key[Array, "P M"]]:
    """Split prompts over the devices, or where they are too few the samples of every prompt.

    Raises:
      InputError: neither divides evenly.
    """
    prompts, samples = keys.shape
    if by_prompts is None:
        by_prompts = split_by_prompts(prompts, samples, mesh)
    if by_prompts:
        return shard_rows(batch, mesh, shard), put_groups(keys, mesh, by_prompts=True)
    return replicate(batch, mesh), put_groups(keys, mesh, by_prompts=False)


def put_groups(array: Any, mesh: Mesh, *, by_prompts: bool) -> jax.Array:
    """An array [P, M, …]."""
    axes = ("batch", None) if by_prompts else (None, "batch")
    return put(array, sharding(mesh, (*axes, *(None,) * (array.ndim - 2)), array.shape))


def gather(tree: Any) -> Any:
    """Global arrays, whole on every process, as NumPy."""

    def whole(leaf: Any) -> np.ndarray:
        if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable and not leaf.is_fully_replicated:
            where = NamedSharding(leaf.sharding.mesh, PartitionSpec())  # pyright: ignore
            leaf = jax.jit(jnp.copy, out_shardings=where)(leaf)
        return np.asarray(leaf)

    return jax.tree.map(whole, tree)
