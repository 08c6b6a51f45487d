"""transformers' `generate` on a bench's prompts: each sample a row of one batch, as its num_return_sequences makes them (io)."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np

from sif_jax.bench.decode_workload import Timed, Workload
from sif_jax.bench.transformers_model import load_transformers, on_device, open_torch, prompt_inputs
from sif_jax.models.qwen2_5_vl.config import Qwen2_5_VLConfig


class TransformersGenerate:
    def __init__(self, checkpoint: Path, config: Qwen2_5_VLConfig, dtype: str) -> None:
        """
        Raises:
          InputError: PyTorch is not installed.
        """
        self._torch, self._config = open_torch(), config
        self._model = load_transformers(checkpoint, dtype).eval()

    def timed(self, work: Workload) -> Timed:
        """Every row ends at its limit; the batch goes on until its last row has."""
        prompts, samples = work.limits.shape
        began = time.perf_counter()
        inputs = on_device(prompt_inputs(work.batch, self._config, copies=samples), self._model)
        length = inputs["input_ids"].shape[1]
        with self._torch.inference_mode():
            out = self._model.generate(**inputs, **self._settings(work, length))
        ids = out[:, length:].cpu().numpy()
        seconds = time.perf_counter() - began
        tokens = np.zeros((prompts * samples, work.sampling.max_new_tokens), np.int32)
        for row, limit in enumerate(work.limits.reshape(-1)):
            tokens[row, :limit] = ids[row, :limit]
        return Timed(seconds, tokens.reshape(prompts, samples, -1))

    def _settings(self, work: Workload, length: int) -> dict[str, Any]:
        from transformers.generation.stopping_criteria import StoppingCriteriaList

        limits = self._torch.from_numpy(work.limits.reshape(-1)).to(self._model.device)
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
