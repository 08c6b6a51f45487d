"""Qwen2.5-VL weights between Hugging Face safetensors and our stacked modules (io).

Written with the hub's names; the spelling of transformers 5 is read too. A stacked parameter [layer, …] is filled from, and
written to, one tensor per layer. Tensors pass through host memory one at a time; they are transposed, cast, checked and
put into their slot on the devices.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Int, Shaped

from sif_jax.atomic import new_directory
from sif_jax.errors import InputError
from sif_jax.models.qwen2_5_vl.axes import check_heads, parameter_sharding
from sif_jax.models.qwen2_5_vl.config import Qwen2_5_VLConfig, write_dtype
from sif_jax.models.qwen2_5_vl.layers import LoRAParam
from sif_jax.models.qwen2_5_vl.model import Qwen2_5_VL
from sif_jax.models.qwen2_5_vl.names import Tensor, checkpoint_tensors, hub_name
from sif_jax.models.qwen2_5_vl.tensor_file import INDEX, TensorFile, TensorSpec, weight_files, write_tensors
from sif_jax.ops.attention_backends import Backend
from sif_jax.ops.scan import Remat
from sif_jax.parallel.placement import gather

SHARD_BYTES = 5 * 10**9
# A parameter up to this size, all its layers together, is laid out on the host: norms and biases need no program each.
SMALL_BYTES = 2**24


def abstract_model(
    config: Qwen2_5_VLConfig,
    *,
    param_dtype: Any,
    compute_dtype: Any = None,
    remat: Remat = "none",
    attention: Backend = "xla",
    scan_layers: bool = True,
) -> Qwen2_5_VL:
    """The model with shapes in place of arrays."""
    return nnx.eval_shape(
        lambda: Qwen2_5_VL(
            config,
            param_dtype=param_dtype,
            compute_dtype=compute_dtype,
            remat=remat,
            attention=attention,
            scan_layers=scan_layers,
            rngs=nnx.Rngs(params=0),
        )
    )


def load_model(
    directory: str | Path,
    *,
    dtype: str = "float32",
    remat: Remat = "none",
    attention: Backend = "xla",
    scan_layers: bool = True,
    mesh: Mesh | None = None,
) -> Qwen2_5_VL:
    """Read a Hugging Face directory (one or several safetensors files) into a model, born split over the mesh.

    Raises:
      InputError: a tensor is missing, left over, given twice, of another shape or type, not finite, or unreadable.
    """
    directory = Path(directory)
    config = Qwen2_5_VLConfig.from_directory(directory)
    if mesh is not None:
        check_heads(config, mesh, directory)
    graphdef, state = nnx.split(
        abstract_model(config, param_dtype=jnp.dtype(dtype), remat=remat, attention=attention, scan_layers=scan_layers)
    )
    tensors, flat = checkpoint_tensors(config, state), nnx.to_flat_state(state)
    shardings = {path: mesh and parameter_sharding(mesh, path, leaf.shape) for path, leaf in flat}
    parameters = {path: _Parameter(tensors[path], leaf.shape, leaf.dtype, shardings[path]) for path, leaf in flat}
    slots = {name: (path, layer) for path in tensors for layer, name in enumerate(tensors[path].names)}
    sources = _find_sources(directory)
    _check_names(directory, set(slots), set(sources), config)
    _check_shapes(tensors.values(), sources)
    for name, source in sources.items():
        if name not in slots:  # the copy of a tied head
            continue
        path, layer = slots[name]
        if not parameters[path].add(source, layer):
            raise InputError(
                f"tensor {name} holds NaN or infinity", file=source.file.path, fix="use an intact checkpoint"
            )
    return nnx.merge(
        graphdef, nnx.from_flat_state([(path, leaf.replace(parameters[path].on_devices())) for path, leaf in flat])
    )


class _Source(NamedTuple):
    """Where a tensor of the checkpoint comes from."""

    file: TensorFile
    name: str  # in the file's spelling


def _find_sources(directory: Path) -> dict[str, _Source]:
    """By hub name; file by file, each in its own order."""
    sources: dict[str, _Source] = {}
    for file in map(TensorFile, weight_files(directory)):
        for inner in file.names:
            name = hub_name(inner)
            if name in sources:
                raise InputError(
                    f"tensor {name} is given twice",
                    file=file.path,
                    value=inner,
                    expected=f"it in {sources[name].file.path.name} alone",
                    fix="remove the file that does not belong to this checkpoint",
                )
            sources[name] = _Source(file, inner)
    return sources


def _check_names(directory: Path, wanted: set[str], present: set[str], config: Qwen2_5_VLConfig) -> None:
    if missing := sorted(wanted - present):
        raise InputError(
            f"{len(missing)} of {len(wanted)} tensors are missing",
            file=directory,
            value=missing[0],
            fix="check that every shard is there and config.json belongs to these weights",
        )
    ignored = {"lm_head.weight"} if config.text.tie_word_embeddings else set()
    if extra := sorted(present - wanted - ignored):
        raise InputError(
            f"{len(extra)} tensors belong to no layer of the config",
            file=directory,
            value=extra[0],
            fix="check that config.json belongs to these weights",
        )


def _check_shapes(tensors: Iterable[Tensor], sources: Mapping[str, _Source]) -> None:
    for tensor in tensors:
        for name in tensor.names:
            file, inner = sources[name]
            if file.shape(inner) != tensor.shape:
                raise InputError(
                    f"tensor {name} has the wrong shape",
                    file=file.path,
                    value=file.shape(inner),
                    expected=str(tensor.shape),
                    fix="check that config.json belongs to these weights",
                )


class _Parameter:
    """A parameter that is filled tensor by tensor: on the devices, or, where it is small, on the host."""

    def __init__(self, tensor: Tensor, shape: tuple[int, ...], dtype: DTypeLike, sharding: NamedSharding | None):
        self.tensor, self.spec, self.sharding = tensor, TensorSpec(np.dtype(dtype), shape), sharding
        self.array: np.ndarray | jax.Array | None = None

    def add(self, source: _Source, layer: int) -> bool:
        """Whether the tensor is finite. Waits, so that one tensor at a time is in host memory."""
        if self.spec.nbytes <= SMALL_BYTES:
            return self._add_on_host(source, layer)
        dtype, shape = self.spec
        if self.tensor.stacked and self.array is None:
            self.array = jax.jit(jnp.zeros, static_argnums=(0, 1), out_shardings=self.sharding)(shape, dtype)
        self.array, finite = _fill(
            self.array, self._put(source), layer, dtype=dtype, transposed=self.tensor.transposed, sharding=self.sharding
        )
        return bool(finite)

    def _add_on_host(self, source: _Source, layer: int) -> bool:
        value = source.file.read(source.name)
        if self.array is None:
            self.array = np.empty(self.spec.shape, self.spec.dtype)
        self.array[layer if self.tensor.stacked else ...] = value.T if self.tensor.transposed else value
        return bool(np.isfinite(value).all())

    def _put(self, source: _Source) -> Shaped[Array, "..."]:
        """The tensor as on disk, kernels as matrices; a process reads the parts that its devices hold."""
        if self.sharding is None:
            return jax.device_put(source.file.read(source.name))
        rows, *rest = self.tensor.shape
        shape = (rows, math.prod(rest)) if rest else (rows,)
        axes = tuple(self.sharding.spec)[int(self.tensor.stacked) :]
        on_disk = NamedSharding(self.sharding.mesh, PartitionSpec(*(axes[::-1] if self.tensor.transposed else axes)))
        return jax.make_array_from_callback(shape, on_disk, lambda index: source.file.read(source.name, index))

    def on_devices(self) -> jax.Array:
        array = self.array
        if isinstance(array, np.ndarray):
            if self.sharding is None:
                return jax.device_put(array)
            return jax.make_array_from_callback(array.shape, self.sharding, array.__getitem__)
        assert array is not None
        return array


@partial(jax.jit, donate_argnames="stack", static_argnames=("dtype", "transposed", "sharding"))
def _fill(
    stack: Shaped[Array, "..."] | None,
    raw: Shaped[Array, "..."],
    layer: Int[Array, ""] | int,
    *,
    dtype: np.dtype,
    transposed: bool,
    sharding: NamedSharding | None,
) -> tuple[Shaped[Array, "..."], Bool[Array, ""]]:
    """The parameter, or its stack with one more layer, and whether what came in is finite."""
    value = (raw.T if transposed else raw).astype(dtype)
    filled = value if stack is None else jax.lax.dynamic_update_index_in_dim(stack, value, layer, axis=0)
    if sharding is not None:
        filled = jax.lax.with_sharding_constraint(filled, sharding)
    # NaN passes through both; isfinite().all() would take another byte per element on CPU.
    return filled, (jnp.max(raw) < jnp.inf) & (jnp.min(raw) > -jnp.inf)


@partial(jax.jit, static_argnames=("stacked", "transposed"))
def _take(
    whole: Shaped[Array, "..."], layer: Int[Array, ""] | int, *, stacked: bool, transposed: bool
) -> Shaped[Array, "..."]:
    value = jax.lax.dynamic_index_in_dim(whole, layer, keepdims=False) if stacked else whole
    return value.T if transposed else value


class _Export(NamedTuple):
    """A tensor to be written: known by its shape until it is gathered."""

    name: str
    layer: int
    tensor: Tensor
    array: jax.Array

    @property
    def spec(self) -> TensorSpec:
        return TensorSpec(np.dtype(self.array.dtype), self.tensor.shape)

    def gather(self) -> np.ndarray:
        if self.array.nbytes <= SMALL_BYTES:
            return self.tensor.to_theirs(gather(self.array)[self.layer if self.tensor.stacked else ...])
        value = _take(self.array, self.layer, stacked=self.tensor.stacked, transposed=self.tensor.transposed)
        return gather(value).reshape(self.tensor.shape)


def _exports(model: Qwen2_5_VL) -> Iterator[_Export]:
    """Every weight; adapters are not part of it."""
    _, adapters, state = nnx.split(model, LoRAParam, ...)
    del adapters
    tensors = checkpoint_tensors(model.config, state)
    for path, leaf in nnx.to_flat_state(state):
        for layer, name in enumerate(tensors[path].names):
            yield _Export(name, layer, tensors[path], leaf[...])


def _plan_shards(exports: Iterable[_Export], shard_bytes: int) -> list[list[_Export]]:
    shards: list[list[_Export]] = [[]]
    size = 0
    for export in exports:
        if shards[-1] and size + export.spec.nbytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(export)
        size += export.spec.nbytes
    return shards


def save_weights(model: Qwen2_5_VL, directory: Path, *, shard_bytes: int = SHARD_BYTES) -> None:
    """Write safetensors shards and their index; one file when it fits. One tensor at a time is in host memory."""
    shards = _plan_shards(_exports(model), shard_bytes)
    if len(shards) == 1:
        _write_shard(directory / "model.safetensors", shards[0])
        return
    files = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    for file, shard in zip(files, shards):
        _write_shard(directory / file, shard)
    weight_map = {export.name: file for file, shard in zip(files, shards) for export in shard}
    specs = [export.spec for shard in shards for export in shard]
    totals = {
        "total_parameters": sum(math.prod(spec.shape) for spec in specs),
        "total_size": sum(spec.nbytes for spec in specs),
    }
    index = {"metadata": totals, "weight_map": weight_map}
    (directory / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def gather_weights(model: Qwen2_5_VL) -> None:
    """The part of the other processes in `save_weights` by one: they give their parts of each tensor, in its order."""
    for export in _exports(model):
        export.gather()


def _write_shard(path: Path, shard: list[_Export]) -> None:
    write_tensors(path, {export.name: export.spec for export in shard}, (export.gather() for export in shard))


def save_model(model: Qwen2_5_VL, directory: str | Path, *, source: str | Path) -> None:
    """Write a Hugging Face directory: the weights, and config, tokenizer and processor files copied from `source`.

    The directory appears whole or not at all.

    Raises:
      InputError: the directory exists, or the disk is full.
    """
    with new_directory(Path(directory)) as partial:
        write_model(model, partial, source=Path(source))


def write_model(model: Qwen2_5_VL, directory: Path, *, source: Path) -> None:
    """The files of `save_model`, into a directory that is there."""
    for file in source.iterdir():
        if file.suffix in (".json", ".jinja", ".txt") and not file.name.endswith(".index.json"):
            shutil.copy(file, directory / file.name)
    write_dtype(directory, model.embed_tokens.dtype)
    save_weights(model, directory)
