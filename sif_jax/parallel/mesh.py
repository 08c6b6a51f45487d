"""Where arrays live: batches split over the data axis, everything else on every device (io)."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

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
            "rows do not divide over the devices", value=rows, expected=f"a multiple of {mesh.size}", fix="change batch_size"
        )
    return jax.device_put(batch, NamedSharding(mesh, PartitionSpec("data")))
