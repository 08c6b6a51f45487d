"""Where arrays live: batches split over the devices, everything else whole on every device (io)."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Key

from sif_jax.errors import InputError


def data_mesh() -> Mesh:
    return jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))


def replicate(tree: Any, mesh: Mesh) -> Any:
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))


def shard_rows(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Split the leading axis of every array over the devices.

    Raises:
      InputError: the rows do not divide evenly.
    """
    rows = len(batch["tokens"])
    if rows % mesh.size:
        raise InputError(
            "rows do not divide over the devices",
            value=rows,
            expected=f"a multiple of {mesh.size}",
            fix="change batch_size",
        )
    return jax.device_put(batch, NamedSharding(mesh, PartitionSpec("data")))


def shard_groups(
    batch: dict[str, np.ndarray], keys: Key[Array, "P M"], mesh: Mesh
) -> tuple[dict[str, jax.Array], Key[Array, "P M"]]:
    """Split prompts over the devices, or where they are too few the samples of every prompt.

    Raises:
      InputError: neither divides evenly.
    """
    prompts, samples = keys.shape
    if prompts % mesh.size == 0:
        return shard_rows(batch, mesh), jax.device_put(keys, NamedSharding(mesh, PartitionSpec("data")))
    if samples % mesh.size:
        raise InputError(
            "neither prompts nor samples divide over the devices",
            value=f"prompts_per_step={prompts}, num_samples={samples}",
            expected=f"a multiple of {mesh.size}",
            fix="change prompts_per_step or num_samples",
        )
    return replicate(batch, mesh), jax.device_put(keys, NamedSharding(mesh, PartitionSpec(None, "data")))
