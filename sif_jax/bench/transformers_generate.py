"""transformers' `generate` on a bench's prompts: each sample a row of one batch, as its num_return_sequences makes them (io)."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from sif_jax.bench.decode_workload import Timed, Workload
from sif_jax.errors import InputError
from sif_jax.models.qwen2_5_vl.config import Qwen2_5_VLConfig


class TransformersGenerate:
    def __init__(self, checkpoint: Path, config: Qwen2_5_VLConfig, dtype: str) -> None:
        """
        Raises:
          InputError: PyTorch is not installed.
        """
        try:
            import torch
        except ImportError:
            raise InputError("transformers needs PyTorch", expected="torch", fix="pip install torch") from None
        from transformers import Qwen2_5_VLForConditionalGeneration

        self._torch, self._config = torch, config
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        model: Any = Qwen2_5_VLForConditionalGeneration.from_pretrained(checkpoint, dtype=getattr(torch, dtype))
        self._model = model.eval().to(self._device)

    def timed(self, work: Workload) -> Timed:
        """Every row ends at its limit; the batch goes on until its last row has."""
        prompts, samples = work.limits.shape
        began = time.perf_counter()
        inputs, length = self._inputs(work, samples)
        with self._torch.inference_mode():
            out = self._model.generate(**inputs, **self._settings(work, length))
        ids = out[:, length:].cpu().numpy()
        seconds = time.perf_counter() - began
        tokens = np.zeros((prompts * samples, work.sampling.max_new_tokens), np.int32)
        for row, limit in enumerate(work.limits.reshape(-1)):
            tokens[row, :limit] = ids[row, :limit]
        return Timed(seconds, tokens.reshape(prompts, samples, -1))

    def _inputs(self, work: Workload, samples: int) -> tuple[dict[str, Any], int]:
        """All prompts of a bench are equally long and fill their rows."""
        torch, vision = self._torch, self._config.vision
        tokens: Int[np.ndarray, "P L"] = work.batch["tokens"]
        assert (work.batch["segments"] > 0).all()
        grids = [_grids(*row) for row in zip(work.batch["patch_positions"], work.batch["patch_segments"])]
        patches = work.batch["patches"].reshape(len(tokens), -1, vision.patch_dim)
        arrays = {
            "input_ids": np.repeat(tokens, samples, axis=0).astype(np.int64),
            "attention_mask": np.ones((len(tokens) * samples, tokens.shape[1]), np.int64),
            "mm_token_type_ids": np.repeat((tokens == self._config.image_token_id).astype(np.int64), samples, axis=0),
            "pixel_values": np.repeat(patches, samples, axis=0).reshape(-1, vision.patch_dim),
            "image_grid_thw": np.repeat(np.array(grids, np.int64), samples, axis=0).reshape(-1, 3),
        }
        inputs = {name: torch.from_numpy(array).to(self._device) for name, array in arrays.items()}
        inputs["pixel_values"] = inputs["pixel_values"].to(self._model.dtype)
        return inputs, tokens.shape[1]

    def _settings(self, work: Workload, length: int) -> dict[str, Any]:
        from transformers.generation.stopping_criteria import StoppingCriteriaList

        limits = self._torch.from_numpy(work.limits.reshape(-1)).to(self._device)
        settings = {
            "max_new_tokens": int(work.limits.max()),
            "eos_token_id": None,
            "pad_token_id": 0,
            "suppress_tokens": list(work.sampling.forbidden_ids),
            "stopping_criteria": StoppingCriteriaList([lambda ids, scores, **_: ids.shape[1] - length >= limits]),
        }
        if not work.sampling.temperature:
            return settings | {"do_sample": False}
        return settings | {"do_sample": True, "temperature": work.sampling.temperature, "top_k": 0}


def _grids(positions: Int[np.ndarray, "V 2"], segments: Int[np.ndarray, "V"]) -> list[tuple[int, int, int]]:
    """(1, height, width) in patches of each image of a row."""
    images = [positions[segments == number] for number in range(1, segments.max() + 1)]
    sizes = [image.max(axis=0) + 1 for image in images]
    return [(1, int(height), int(width)) for height, width in sizes]
