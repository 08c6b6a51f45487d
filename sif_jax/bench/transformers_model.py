"""transformers' Qwen2.5-VL for the benches, and a batch of ours as its inputs (io)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from sif_jax.errors import InputError
from sif_jax.models.qwen2_5_vl.config import Qwen2_5_VLConfig


def open_torch() -> Any:
    """
    Raises:
      InputError: PyTorch is not installed.
    """
    try:
        import torch
    except ImportError:
        raise InputError("transformers needs PyTorch", expected="torch", fix="pip install torch") from None
    return torch


def load_transformers(checkpoint: Path, dtype: str) -> Any:
    """On the first GPU if there is one."""
    torch = open_torch()
    from transformers import Qwen2_5_VLForConditionalGeneration

    model: Any = Qwen2_5_VLForConditionalGeneration.from_pretrained(checkpoint, dtype=getattr(torch, dtype))
    return model.to("cuda" if torch.cuda.is_available() else "cpu")


def prompt_inputs(
    batch: dict[str, np.ndarray], config: Qwen2_5_VLConfig, *, copies: int = 1, rows: slice = slice(None)
) -> dict[str, np.ndarray]:
    """Inputs by their names in transformers, each row `copies` times; one example a row, padded at its end, all with images
    of the same size."""
    vision, tokens = config.vision, batch["tokens"][rows]
    assert (batch["patch_segments"] > 0).all()
    positions, segments = batch["patch_positions"][rows], batch["patch_segments"][rows]
    grids = [_grids(*row) for row in zip(positions, segments, strict=True)]
    arrays = {
        "input_ids": tokens.astype(np.int64),
        "attention_mask": (batch["segments"][rows] > 0).astype(np.int64),
        "mm_token_type_ids": (tokens == config.image_token_id).astype(np.int64),
        "pixel_values": batch["patches"][rows],
        "image_grid_thw": np.array(grids, np.int64),
    }
    arrays = {name: np.repeat(array, copies, axis=0) for name, array in arrays.items()}
    return arrays | {
        "pixel_values": arrays["pixel_values"].reshape(-1, vision.patch_dim),
        "image_grid_thw": arrays["image_grid_thw"].reshape(-1, 3),
    }


def on_device(arrays: dict[str, np.ndarray], model: Any) -> dict[str, Any]:
    torch = open_torch()
    tensors = {name: torch.from_numpy(array).to(model.device) for name, array in arrays.items()}
    return tensors | {"pixel_values": tensors["pixel_values"].to(model.dtype)}


def _grids(positions: Int[np.ndarray, "V 2"], segments: Int[np.ndarray, "V"]) -> list[tuple[int, int, int]]:
    """(1, height, width) in patches of each image of a row."""
    images = [positions[segments == number] for number in range(1, segments.max() + 1)]
    sizes = [image.max(axis=0) + 1 for image in images]
    return [(1, int(height), int(width)) for height, width in sizes]
