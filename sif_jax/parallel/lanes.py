"""Lanes: shares of a rollout that the devices along the batch axes of the mesh decode side by side (pure)."""

from __future__ import annotations

from math import prod

import jax
from jax.sharding import PartitionSpec
from jaxtyping import Array

BATCH_AXES = ("data", "fsdp")


def num_lanes() -> int:
    """The devices along the batch axes of the mesh that `jax.set_mesh` has set; 1 without a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    return prod(mesh.shape[name] for name in _axes())


def split_lanes(x: Array, axis: int = 0) -> Array:
    """Inside jit: an array whose `axis` counts lanes, each lane on its device."""
    names = _axes()
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*[None] * axis, names)) if names else x


def _axes() -> tuple[str, ...]:
    mesh = jax.sharding.get_abstract_mesh()
    return tuple(name for name in BATCH_AXES if name in mesh.axis_names and mesh.shape[name] > 1)
