"""The names of every parameter's axes, which `parallel/partition.py` lays on the mesh, and what a model asks of a mesh (io)."""

from __future__ import annotations

from pathlib import Path

import jax
from flax import nnx
from jax.sharding import AbstractMesh, Mesh, NamedSharding

from sif_jax.errors import InputError
from sif_jax.models.qwen2_5_vl.config import Qwen2_5_VLConfig
from sif_jax.models.qwen2_5_vl.model import Qwen2_5_VL
from sif_jax.models.qwen2_5_vl.names import STACKS, PathParts
from sif_jax.parallel.partition import Axes, sharding
from sif_jax.parallel.placement import put

KERNELS: dict[str, tuple[str, str]] = {
    "q_proj": ("embed", "heads"),
    "k_proj": ("embed", "kv_heads"),
    "v_proj": ("embed", "kv_heads"),
    "o_proj": ("heads", "embed"),
    "gate_proj": ("embed", "ffn"),
    "up_proj": ("embed", "ffn"),
    "down_proj": ("ffn", "embed"),
    "qkv": ("embed", "qkv"),
    "proj": ("heads", "embed"),
    "patch_embed": ("pixels", "embed"),
    "fc1": ("embed", "ffn"),
    "fc2": ("ffn", "embed"),
}
LEAVES: dict[str, tuple[str, ...]] = {
    "bias": ("bias",),
    "scale": ("norm",),
    "lora_a": ("adapted", "rank"),
    "lora_b": ("rank", "adapted"),
    "embed_tokens": ("vocab", "embed"),
    "lm_head": ("embed", "vocab"),
}


def parameter_axes(path: PathParts) -> Axes:
    """By the parameter's path in the model, such as ("decoder", "layers", "q_proj", "kernel")."""
    inner = KERNELS[str(path[-2])] if path[-1] == "kernel" else LEAVES[str(path[-1])]
    return ("layers", *inner) if path[:2] in STACKS else inner


def parameter_sharding(mesh: Mesh | AbstractMesh, path: PathParts, shape: tuple[int, ...]) -> NamedSharding:
    return sharding(mesh, parameter_axes(path), shape)


def place_parameters(model: Qwen2_5_VL, mesh: Mesh) -> None:
    """Move what does not lie on the mesh yet, such as new adapters, to where the table says."""

    def placed(path: PathParts, array: jax.Array) -> jax.Array:
        where = parameter_sharding(mesh, path, array.shape)
        return array if array.sharding == where else put(array, where)

    flat = nnx.to_flat_state(nnx.state(model))
    nnx.update(model, nnx.from_flat_state([(path, leaf.replace(placed(path, leaf[...]))) for path, leaf in flat]))


def check_heads(config: Qwen2_5_VLConfig, mesh: Mesh | AbstractMesh, file: Path) -> None:
    """
    Raises:
      InputError: `tensor` devices cannot share the heads of the decoder or of the vision tower.
    """
    tensor = mesh.shape.get("tensor", 1)
    heads = {
        "num_attention_heads": config.text.num_attention_heads,
        "num_key_value_heads": config.text.num_key_value_heads,
        "vision heads": config.vision.num_heads,
    }
    for name, count in heads.items():
        if count % tensor:
            raise InputError(
                f"mesh.tensor does not divide the {count} {name}",
                file=file,
                value=tensor,
                expected=f"a divisor of {count}",
                fix="lower mesh.tensor and raise mesh.fsdp",
            )
