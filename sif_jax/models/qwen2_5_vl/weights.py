"""Qwen2.5-VL weights between Hugging Face safetensors and our stacked modules (io).

Written with the hub's names; the spelling of transformers 5 is read too. A stacked parameter [layer, …] is filled from, and
written to, one tensor per layer.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from sif_jax.errors import InputError
from sif_jax.models.qwen2_5_vl.config import Qwen2_5_VLConfig
from sif_jax.models.qwen2_5_vl.layers import LoRAParam
from sif_jax.models.qwen2_5_vl.model import Qwen2_5_VL
from sif_jax.models.qwen2_5_vl.names import Tensor, checkpoint_tensors, hub_name
from sif_jax.ops.scan import Remat

SHARD_BYTES = 5 * 10**9


def abstract_model(
    config: Qwen2_5_VLConfig, *, param_dtype: Any, compute_dtype: Any = None, remat: Remat = "none"
) -> Qwen2_5_VL:
    """The model with shapes in place of arrays."""
    return nnx.eval_shape(
        lambda: Qwen2_5_VL(
            config, param_dtype=param_dtype, compute_dtype=compute_dtype, remat=remat, rngs=nnx.Rngs(params=0)
        )
    )


def load_model(directory: str | Path, *, dtype: str = "float32", remat: Remat = "none") -> Qwen2_5_VL:
    """Read a Hugging Face directory (one or several safetensors files) into a model.

    Raises:
      InputError: a tensor is missing, left over, of another shape, or unreadable.
    """
    directory = Path(directory)
    config = Qwen2_5_VLConfig.from_directory(directory)
    graphdef, state = nnx.split(abstract_model(config, param_dtype=jnp.dtype(dtype), remat=remat))
    tensors = checkpoint_tensors(config, state)
    with ExitStack() as stack:
        files = _open_files(directory, stack)
        _check_names(directory, {name for tensor in tensors.values() for name in tensor.names}, set(files), config)
        flat = [
            (path, leaf.replace(jax.device_put(_read(directory, files, tensors[path], leaf))))
            for path, leaf in nnx.to_flat_state(state)
        ]
    return nnx.merge(graphdef, nnx.from_flat_state(flat))


def _open_files(directory: Path, stack: ExitStack) -> dict[str, tuple[Any, str]]:
    """Tensor name (hub spelling) → (open file, name inside the file)."""
    paths = sorted(directory.glob("*.safetensors"))
    if not paths:
        raise InputError(
            "no weights here", file=directory, expected="*.safetensors files", fix="pickles are never read"
        )
    found = {}
    for path in paths:
        try:
            file = stack.enter_context(safe_open(path, framework="np"))
        except (SafetensorError, OSError) as error:
            raise InputError(f"cannot be read: {error}", file=path, fix="copy or download the file again") from None
        found |= {hub_name(name): (file, name) for name in file.keys()}  # noqa: SIM118  not a dict
    return found


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


def _read(directory: Path, files: dict[str, tuple[Any, str]], tensor: Tensor, leaf: nnx.Variable) -> np.ndarray:
    whole = np.empty(leaf.shape, leaf.dtype)
    for layer, name in enumerate(tensor.names):
        file, inner = files[name]
        value = file.get_tensor(inner)
        if value.shape != tensor.shape:
            raise InputError(
                f"tensor {name} has the wrong shape", file=directory, value=value.shape, expected=str(tensor.shape)
            )
        if not np.isfinite(value.astype(np.float32)).all():
            raise InputError(f"tensor {name} holds NaN or infinity", file=directory, fix="use an intact checkpoint")
        whole[layer if tensor.stacked else ...] = tensor.to_ours(value)
    return whole


def export_tensors(model: Qwen2_5_VL) -> Iterator[tuple[str, np.ndarray]]:
    """Every weight under its hub name; adapters are not part of it."""
    _, adapters, state = nnx.split(model, LoRAParam, ...)
    del adapters
    tensors = checkpoint_tensors(model.config, state)
    for path, leaf in nnx.to_flat_state(state):
        tensor, value = tensors[path], np.asarray(leaf[...])
        for layer, name in enumerate(tensor.names):
            yield name, np.ascontiguousarray(tensor.to_theirs(value[layer] if tensor.stacked else value))


def save_weights(model: Qwen2_5_VL, directory: Path, *, shard_bytes: int = SHARD_BYTES) -> None:
    """Write safetensors shards and their index; one file when it fits."""
    shards: list[dict[str, np.ndarray]] = [{}]
    for name, value in export_tensors(model):
        if shards[-1] and sum(x.nbytes for x in shards[-1].values()) + value.nbytes > shard_bytes:
            shards.append({})
        shards[-1][name] = value
    if len(shards) == 1:
        save_file(shards[0], directory / "model.safetensors", metadata={"format": "pt"})
        return
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, directory / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
    total = sum(x.nbytes for shard in shards for x in shard.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def save_model(model: Qwen2_5_VL, directory: str | Path, *, source: str | Path) -> None:
    """Write a Hugging Face directory: the weights, and config, tokenizer and processor files copied from `source`.

    The directory appears whole or not at all.
    """
    directory, source = Path(directory), Path(source)
    if directory.exists():
        raise InputError("already exists", file=directory, fix="choose another directory or remove this one")
    partial = directory.with_name(directory.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        for file in source.iterdir():
            if file.suffix in (".json", ".jinja", ".txt") and not file.name.endswith(".index.json"):
                shutil.copy(file, partial / file.name)
        save_weights(model, partial)
        partial.rename(directory)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise InputError(
            f"cannot save the model: {error.strerror}", file=directory, fix="free space or choose another disk"
        ) from error
