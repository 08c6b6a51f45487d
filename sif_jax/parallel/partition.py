"""Which mesh axes split what: the one table from names of axes to the mesh, for weights, batches and activations (pure)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Shaped

RULES: Mapping[str, tuple[str, ...]] = {
    # weights
    "layers": (),  # the scan over layers gathers one at a time
    "embed": ("fsdp",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "qkv": (),  # the tower's fused product: a cut through it would lie inside q, k or v
    "ffn": ("tensor",),
    "pixels": (),
    "vocab": ("tensor",),
    "norm": ("fsdp",),
    "bias": ("tensor", "fsdp"),
    "adapted": ("tensor", "fsdp"),  # the wide axis of a LoRA factor; the other is its rank
    "rank": (),
    # batches and activations
    "batch": ("data", "fsdp"),
    "tokens": ("sequence",),
    "patches": ("sequence",),
    "attention": ("tensor", "sequence"),  # heads while they attend: the tokens of a row are then together
    "rows": ("data", "fsdp", "sequence"),  # tokens of all rows, in the loss
}

Axes = Sequence[str | None]


def partition(mesh: Mesh | AbstractMesh, axes: Axes, shape: Sequence[int]) -> PartitionSpec:
    """Split each named axis over as many of its mesh axes, from the first on, as divide it; other axes stay whole."""
    return PartitionSpec(*(_entry(_dividing(mesh, name, size)) for name, size in zip(axes, shape, strict=True)))


def sharding(mesh: Mesh | AbstractMesh, axes: Axes, shape: Sequence[int]) -> NamedSharding:
    return NamedSharding(mesh, partition(mesh, axes, shape))


def num_shards(mesh: Mesh | AbstractMesh, name: str) -> int:
    """How many parts the table makes of this axis; 1 without a mesh."""
    return math.prod(mesh.shape[axis] for axis in RULES[name] if axis in mesh.shape)


def constrain(x: Shaped[Array, "..."], *axes: str | None) -> Shaped[Array, "..."]:
    """Inside jit under `jax.set_mesh`: hold a value to the table; "..." and axes that do not divide are left to the compiler.

    Axes without a name (None) are whole on every device. One device or no mesh: the value itself.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1 or any(kind != AxisType.Auto for kind in mesh.axis_types):
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*(_held(mesh, *each) for each in zip(axes, x.shape))))


def on_own_rows(
    function: Callable[..., Array], *arrays: Shaped[Array, "B ..."], axes: Axes = ()
) -> Shaped[Array, "B ..."]:
    """Inside jit under `jax.set_mesh`: a function of rows, run by each device on its own.

    `axes` name the first array's axes from the third on, and the result's: each device has its part of them.

    Left to itself, XLA (jax 0.10.2, CPU) gathers wrong elements where rows are split over two mesh axes beside a third.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1 or any(kind != AxisType.Auto for kind in mesh.axis_types):
        return function(*arrays)
    first = arrays[0]
    whole = partition(mesh, ("batch", None, *axes), first.shape[: 2 + len(axes)])
    specs = whole, *(PartitionSpec(whole[0]) for _ in arrays[1:])
    return jax.shard_map(function, in_specs=specs, out_specs=whole, check_vma=False)(*arrays)


def _held(mesh: AbstractMesh, name: str | None, size: int):
    if name is None:
        return None
    split = () if name == "..." else _dividing(mesh, name, size)
    return _entry(split) if split else PartitionSpec.UNCONSTRAINED


def _dividing(mesh: Mesh | AbstractMesh, name: str | None, size: int) -> tuple[str, ...]:
    split: tuple[str, ...] = ()
    for axis in RULES[name] if name else ():
        if axis in mesh.shape and mesh.shape[axis] > 1:
            if size % math.prod(mesh.shape[other] for other in (*split, axis)):
                break
            split = (*split, axis)
    return split


def _entry(split: tuple[str, ...]) -> str | tuple[str, ...] | None:
    return split[0] if len(split) == 1 else split or None
