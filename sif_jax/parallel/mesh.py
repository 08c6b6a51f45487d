"""The job's devices as a mesh of the axes data, fsdp, sequence and tensor (io)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from sif_jax.config import MeshConfig
from sif_jax.config.mesh import AXES
from sif_jax.errors import InputError


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh of the job's devices, or of these, in the topology's own order; of several slices, `data` is the axis that
    crosses from one to another.

    Raises:
      InputError: the axes do not multiply to the devices, or the slices do not divide `data`.
    """
    devices = jax.devices() if devices is None else devices
    shape, types = mesh_shape(config, len(devices)), (AxisType.Auto,) * len(AXES)
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if slices == 1:
        # jax.make_mesh refuses a mesh axis that is part of a torus axis on TPUs other than v5e: 64 x 4 on 16 x 16 chips.
        inside = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
        return Mesh(inside, AXES, axis_types=types)
    inside, across = slice_shapes(shape, slices)
    return Mesh(mesh_utils.create_hybrid_device_mesh(inside, across, devices), AXES, axis_types=types)


def data_mesh() -> Mesh:
    """Every device along `data`."""
    return make_mesh(MeshConfig())


def mesh_shape(config: MeshConfig, devices: int) -> tuple[int, ...]:
    """
    Raises:
      InputError: the axes do not multiply to the devices.
    """
    sizes = [getattr(config, axis) for axis in AXES]
    given = math.prod(size for size in sizes if size != -1)
    if devices % given or (-1 not in sizes and given != devices):
        raise InputError(
            "the mesh does not divide the devices",
            value=", ".join(f"{axis}={size}" for axis, size in zip(AXES, sizes)),
            expected=f"a product of {devices}, the number of devices",
            fix="change the mesh section, or leave one axis at -1",
        )
    return tuple(devices // given if size == -1 else size for size in sizes)


def slice_shapes(shape: tuple[int, ...], slices: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The mesh inside a slice, and the mesh of the slices.

    Raises:
      InputError: the slices do not divide `data`.
    """
    if shape[0] % slices:
        raise InputError(
            "the slices do not divide mesh.data, the one axis that crosses the network between them",
            value=shape[0],
            expected=f"a multiple of {slices}, the number of slices",
            fix="lower mesh.fsdp, mesh.tensor or mesh.sequence until they fit inside a slice",
        )
    return (shape[0] // slices, *shape[1:]), (slices, *(1,) * (len(shape) - 1))
