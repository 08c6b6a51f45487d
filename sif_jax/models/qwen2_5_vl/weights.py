"""Qwen2.5-VL weights between Hugging Face safetensors and our stacked modules (io).

Written with the hub's names; the spelling of transformers 5 is read too. A stacked parameter [layer, …] is filled from, and
written to, one tensor per layer. Tensors pass through host memory one at a time; they are transposed, cast, checked and
put into their slot on the devices.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Int, Shaped

from sif_jax.atomic import new_directory
from sif_jax.errors import InputError
from sif_jax.models.qwen2_5_vl.config import Qwen2_5_VLConfig, write_dtype
from sif_jax.models.qwen2_5_vl.layers import LoRAParam
from sif_jax.models.qwen2_5_vl.model import Qwen2_5_VL
from sif_jax.models.qwen2_5_vl.names import PathParts, Tensor, checkpoint_tensors, hub_name
from sif_jax.models.qwen2_5_vl.tensor_file import TensorFile, TensorSpec, write_tensors
from sif_jax.ops.attention_backends import Backend
from sif_jax.ops.scan import Remat
from sif_jax.parallel.partition import parameter_sharding

INDEX = "model.safetensors.index.json"
SHARD_BYTES = 5 * 10**9


def abstract_model(
    config: Qwen2_5_VLConfig,
    *,
    param_dtype: Any,
    compute_dtype: Any = None,
    remat: Remat = "none",
    attention: Backend = "xla",
) -> Qwen2_5_VL:
    """The model with shapes in place of arrays."""
    return nnx.eval_shape(
        lambda: Qwen2_5_VL(
            config,
            param_dtype=param_dtype,
            compute_dtype=compute_dtype,
            remat=remat,
            attention=attention,
            rngs=nnx.Rngs(params=0),
        )
    )


def load_model(
    directory: str | Path,
    *,
    dtype: str = "float32",
    remat: Remat = "none",
    attention: Backend = "xla",
    mesh: Mesh | None = None,
) -> Qwen2_5_VL:
    """Read a Hugging Face directory (one or several safetensors files) into a model, born split over the mesh.

    Raises:
      InputError: a tensor is missing, left over, given twice, of another shape or type, not finite, or unreadable.
    """
    directory = Path(directory)
    config = Qwen2_5_VLConfig.from_directory(directory)
    graphdef, state = nnx.split(abstract_model(config, param_dtype=jnp.dtype(dtype), remat=remat, attention=attention))
    slots = _slots(config, state)
    sources = _find_sources(directory)
    _check_names(directory, set(slots), set(sources), config)
    for name, slot in slots.items():
        _check_shape(name, slot.tensor, sources[name])
    flat = dict(nnx.to_flat_state(state))
    arrays: dict[PathParts, jax.Array] = {}
    for name, source in sources.items():
        if name not in slots:  # the copy of a tied head
            continue
        path, layer, tensor = slots[name]
        leaf = flat[path]
        sharding = mesh and parameter_sharding(mesh, leaf.shape, stacked=tensor.stacked)
        if path not in arrays:
            arrays[path] = jax.jit(jnp.zeros, static_argnums=(0, 1), out_shardings=sharding)(leaf.shape, leaf.dtype)
        raw = _put(source, tensor, sharding)
        arrays[path], finite = _fill(arrays[path], raw, layer, transposed=tensor.transposed, sharding=sharding)
        if not finite:  # waits, so that one tensor at a time is in host memory
            raise InputError(
                f"tensor {name} holds NaN or infinity", file=source.file.path, fix="use an intact checkpoint"
            )
    return nnx.merge(graphdef, nnx.from_flat_state([(path, leaf.replace(arrays[path])) for path, leaf in flat.items()]))


class _Slot(NamedTuple):
    """Where a tensor of the checkpoint goes."""

    path: PathParts
    layer: int
    tensor: Tensor


class _Source(NamedTuple):
    """Where a tensor of the checkpoint comes from."""

    file: TensorFile
    name: str  # in the file's spelling

    @property
    def shape(self) -> tuple[int, ...]:
        return self.file.shape(self.name)


def _slots(config: Qwen2_5_VLConfig, state: nnx.State) -> dict[str, _Slot]:
    """By hub name."""
    return {
        name: _Slot(path, layer, tensor)
        for path, tensor in checkpoint_tensors(config, state).items()
        for layer, name in enumerate(tensor.names)
    }


def _find_sources(directory: Path) -> dict[str, _Source]:
    """By hub name, file by file, each in its own order."""
    sources: dict[str, _Source] = {}
    for path in _shards(directory):
        file = TensorFile(path)
        for inner in file.names:
            name = hub_name(inner)
            if name in sources:
                raise InputError(
                    f"tensor {name} is given twice",
                    file=path,
                    value=inner,
                    expected=f"it only in {sources[name].file.path.name}",
                    fix="remove the file that does not belong to this checkpoint",
                )
            sources[name] = _Source(file, inner)
    return sources


def _shards(directory: Path) -> list[Path]:
    """The files that the index names; without an index, every safetensors file."""
    index = directory / INDEX
    if not index.exists():
        if paths := sorted(directory.glob("*.safetensors")):
            return paths
        raise InputError(
            "no weights here", file=directory, expected="*.safetensors files", fix="pickles are never read"
        )
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError):
        raise InputError("malformed index", file=index, expected="a JSON object with a weight_map") from None
    if missing := [name for name in names if not (directory / name).is_file()]:
        raise InputError(
            f"{len(missing)} of {len(names)} shards are missing",
            file=index,
            value=missing[0],
            fix="download it into this directory",
        )
    return [directory / name for name in names]


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


def _check_shape(name: str, tensor: Tensor, source: _Source) -> None:
    if source.shape != tensor.shape:
        raise InputError(
            f"tensor {name} has the wrong shape",
            file=source.file.path,
            value=source.shape,
            expected=str(tensor.shape),
            fix="check that config.json belongs to these weights",
        )


def _put(source: _Source, tensor: Tensor, sharding: NamedSharding | None) -> Shaped[Array, "..."]:
    """The tensor as on disk (kernels as matrices), on the devices; a process reads the parts that its devices hold."""
    if sharding is None:
        return jax.device_put(source.file.read(source.name))
    rows, *rest = tensor.shape
    shape = (rows, math.prod(rest)) if rest else (rows,)
    axes = tuple(sharding.spec)[1:] if tensor.stacked else tuple(sharding.spec)
    on_disk = NamedSharding(sharding.mesh, PartitionSpec(*(axes[::-1] if tensor.transposed else axes)))
    return jax.make_array_from_callback(shape, on_disk, lambda index: source.file.read(source.name, index))


@partial(jax.jit, donate_argnames="whole", static_argnames=("transposed", "sharding"))
def _fill(
    whole: Shaped[Array, "..."],
    raw: Shaped[Array, "..."],
    layer: Int[Array, ""] | int,
    *,
    transposed: bool,
    sharding: NamedSharding | None,
) -> tuple[Shaped[Array, "..."], Bool[Array, ""]]:
    """`whole` with one more layer (or all of it, where it has none), and whether that is finite."""
    value = (raw.T if transposed else raw).astype(whole.dtype)
    slot = value.reshape((1,) * (whole.ndim - value.ndim) + value.shape)
    whole = jax.lax.dynamic_update_slice(whole, slot, (layer, *[0] * (whole.ndim - 1)))
    if sharding is not None:
        whole = jax.lax.with_sharding_constraint(whole, sharding)
    return whole, jnp.isfinite(value).all()


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
        tensor = self.tensor
        value = _take(self.array, self.layer, stacked=tensor.stacked, transposed=tensor.transposed)
        return np.asarray(value).reshape(tensor.shape)


def _exports(model: Qwen2_5_VL) -> Iterator[_Export]:
    """Every weight; adapters are not part of it."""
    _, adapters, state = nnx.split(model, LoRAParam, ...)
    del adapters
    flat = dict(nnx.to_flat_state(state))
    for name, (path, layer, tensor) in _slots(model.config, state).items():
        yield _Export(name, layer, tensor, flat[path][...])


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
