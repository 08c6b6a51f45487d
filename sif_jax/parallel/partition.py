"""Which axis of a parameter is split over the devices (pure)."""

from __future__ import annotations

from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec


def parameter_sharding(mesh: Mesh | AbstractMesh, shape: tuple[int, ...], *, stacked: bool = False) -> NamedSharding:
    """Split the largest axis that the mesh axis "fsdp" divides, of equal ones the last; else keep the parameter whole.

    The leading axis of a stacked parameter, its layers, is never split: the scan over layers gathers one at a time.
    """
    spec: list[str | None] = [None] * len(shape)
    if "fsdp" in mesh.axis_names:
        divided = [axis for axis in range(int(stacked), len(shape)) if shape[axis] % mesh.shape["fsdp"] == 0]
        if divided:
            spec[max(divided, key=lambda axis: (shape[axis], axis))] = "fsdp"
    return NamedSharding(mesh, PartitionSpec(*spec))
