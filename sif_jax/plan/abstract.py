"""The arguments of a run's programs, known by shape, type and place alone (pure).

Each lies where the run would put it: weights by `models/qwen2_5_vl/axes.py`, batches by `parallel/placement.py`.
"""

from __future__ import annotations

from math import prod
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sif_jax.config import BucketsConfig, TrainConfig
from sif_jax.data.batch import Collator
from sif_jax.models.qwen2_5_vl.axes import parameter_sharding
from sif_jax.models.qwen2_5_vl.config import Qwen2_5_VLConfig
from sif_jax.models.qwen2_5_vl.layer_arrays import AnyState, abstract_layers
from sif_jax.models.qwen2_5_vl.lora import add_lora, split_trainable
from sif_jax.models.qwen2_5_vl.model import Qwen2_5_VL
from sif_jax.ops.attention_backends import Backend
from sif_jax.parallel.partition import sharding
from sif_jax.parallel.placement import BATCH_AXES

AbstractPolicy = tuple[nnx.GraphDef, nnx.State, AnyState]


def abstract_policy(
    config: TrainConfig, architecture: Qwen2_5_VLConfig, mesh: Mesh, attention: Backend
) -> AbstractPolicy:
    """(graphdef, trainable, frozen): what `training.policy_files.open_policy` would hold."""

    def build() -> Qwen2_5_VL:
        rngs = nnx.Rngs(params=0)
        dtype = jnp.dtype(config.model.dtype)
        model = Qwen2_5_VL(
            architecture,
            param_dtype=dtype,
            remat=config.model.remat,
            attention=attention,
            scan_layers=config.model.scan_layers,
            rngs=rngs,
        )
        if config.lora:
            add_lora(model, **config.lora.model_dump(), freeze_vision=config.freeze_vision, rngs=rngs)
        return model

    graphdef, state = nnx.split(nnx.eval_shape(build))
    placed = [
        (path, leaf.replace(shape(leaf.shape, leaf.dtype, parameter_sharding(mesh, path, leaf.shape))))
        for path, leaf in nnx.to_flat_state(state)
    ]
    model = nnx.merge(graphdef, nnx.from_flat_state(placed))
    graphdef, trainable, frozen = split_trainable(
        model, lora=config.lora is not None, freeze_vision=config.freeze_vision
    )
    return graphdef, trainable, frozen if config.model.scan_layers else abstract_layers(frozen)


def abstract_batch(
    config: TrainConfig, architecture: Qwen2_5_VLConfig, mesh: Mesh, rows: int, *, by_rows: bool = True
) -> dict[str, Any]:
    """Rows of the largest bucket, split over the mesh, or whole on every device."""
    arrays = empty_batch(config.data.buckets, architecture, rows)
    return {name: _rows(name, array, mesh) if by_rows else whole(array, mesh) for name, array in arrays.items()}


def empty_batch(buckets: BucketsConfig, architecture: Qwen2_5_VLConfig, rows: int) -> dict[str, np.ndarray]:
    vision, largest = architecture.vision, buckets.pairs[-1]
    collate = Collator(
        buckets=BucketsConfig(tokens=largest[:1], patches=largest[1:]),
        batch_size=rows,
        pad_id=0,
        image_token_id=architecture.image_token_id,
        merge_size=vision.spatial_merge_size,
        window_patches=vision.window_size // vision.patch_size // vision.spatial_merge_size * vision.spatial_merge_size,
        patch_dim=vision.patch_dim,
        fixed_shape=True,
    )
    return collate([]).arrays


def shape(dims: tuple[int, ...], dtype: Any, where: NamedSharding | None = None) -> Any:
    """It passes for an array wherever a program is traced."""
    return jax.ShapeDtypeStruct(dims, dtype, sharding=where)


def whole(array: Any, mesh: Mesh) -> Any:
    """The same on every device."""
    return shape(array.shape, array.dtype, NamedSharding(mesh, PartitionSpec()))


def group(dims: tuple[int, ...], dtype: Any, mesh: Mesh, *, by_prompts: bool) -> Any:
    """An array [P, M, …], as `parallel.placement.put_groups` lays it."""
    axes = ("batch", None) if by_prompts else (None, "batch")
    return shape(dims, dtype, sharding(mesh, (*axes, *(None,) * (len(dims) - 2)), dims))


def random_key(mesh: Mesh) -> Any:
    return whole(jax.eval_shape(lambda: jax.random.key(0)), mesh)


def placed_as(shapes: Any, shardings: Any) -> Any:
    """Shapes with the places that a compiled program gave its results."""
    return jax.tree.map(lambda x, where: shape(x.shape, x.dtype, where), shapes, shardings)


def device_bytes(tree: Any) -> float:
    """What one device holds of these arrays."""
    return float(sum(_leaf_bytes(leaf) for leaf in jax.tree.leaves(tree)))


def _leaf_bytes(leaf: Any) -> int:
    where = getattr(leaf, "sharding", None)
    dims = leaf.shape if where is None else where.shard_shape(leaf.shape)
    size = 8 if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf.dtype.itemsize
    return prod(dims) * size


def _rows(name: str, array: np.ndarray, mesh: Mesh) -> Any:
    axes = BATCH_AXES.get(name, ("batch",))
    where = sharding(mesh, (*axes, *(None,) * (array.ndim - len(axes))), array.shape)
    return shape(array.shape, array.dtype, where)
