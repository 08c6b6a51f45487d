"""The name and layout of every parameter in a published checkpoint (host).

Names are the hub's (`visual.*`, `model.*`); transformers since 4.52 calls the same modules `model.visual.*` and
`model.language_model.*`. A stacked parameter [layer, …] stands for one tensor per layer.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import numpy as np
from flax import nnx

from sif_jax.models.qwen2_5_vl.config import Qwen2_5_VLConfig

PathParts = tuple[Any, ...]  # flax.typing has it too, but its protocol cannot be checked at run time
STACKS: dict[PathParts, str] = {
    ("decoder", "layers"): "model.layers.{layer}",
    ("vision", "blocks"): "visual.blocks.{layer}",
}
RENAMED: dict[PathParts, str] = {
    ("embed_tokens",): "model.embed_tokens",
    ("lm_head",): "lm_head",
    ("decoder", "norm"): "model.norm",
    ("vision", "patch_embed"): "visual.patch_embed.proj",
    ("vision", "merger", "norm"): "visual.merger.ln_q",
    ("vision", "merger", "fc1"): "visual.merger.mlp.0",
    ("vision", "merger", "fc2"): "visual.merger.mlp.2",
}
ATTENTION = {name: f"self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "o_proj")} | {
    name: f"attn.{name}" for name in ("qkv", "proj")
}


class Tensor(NamedTuple):
    """Where one parameter lives in a checkpoint."""

    names: tuple[str, ...]  # one, or one per layer
    shape: tuple[int, ...]  # of each tensor on disk
    stacked: bool
    transposed: bool  # a kernel is [in, out] here and [out, in, …] on disk

    def to_theirs(self, value: np.ndarray) -> np.ndarray:
        return (value.T if self.transposed else value).reshape(self.shape)


def checkpoint_tensors(config: Qwen2_5_VLConfig, state: nnx.State) -> dict[PathParts, Tensor]:
    """The tensors of a checkpoint, by our parameter path."""
    return {path: _tensor(config, path, leaf.shape) for path, leaf in nnx.to_flat_state(state)}


def _tensor(config: Qwen2_5_VLConfig, path: PathParts, shape: tuple[int, ...]) -> Tensor:
    stacked = path[:2] in STACKS
    inner = shape[1:] if stacked else shape
    leaf = "bias" if path[-1] == "bias" else "weight"
    if stacked:
        parts = [ATTENTION.get(str(part), str(part)) for part in path[2:-1]]
        template = ".".join([STACKS[path[:2]], *parts, leaf])
        names = tuple(template.format(layer=layer) for layer in range(shape[0]))
    else:
        names = (f"{RENAMED[path if path in RENAMED else path[:-1]]}.{leaf}",)
    transposed = path[-1] in ("kernel", "lm_head")
    theirs = inner[::-1] if transposed else inner
    if path == ("vision", "patch_embed", "kernel"):
        vision = config.vision
        theirs = (inner[1], vision.in_channels, vision.temporal_patch_size, vision.patch_size, vision.patch_size)
    return Tensor(names, theirs, stacked, transposed)


def hub_name(name: str) -> str:
    """The hub's spelling of a module or tensor name of transformers."""
    return re.sub(r"^model\.visual\.", "visual.", re.sub(r"^model\.language_model\.", "model.", name))


def transformers_name(name: str) -> str:
    """The name that a module or tensor of the hub's spelling has in transformers since 4.52; inverse of `hub_name`."""
    if name.startswith("visual."):
        return "model." + name
    return re.sub(r"^model\.", "model.language_model.", name)
