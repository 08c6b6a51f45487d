"""The training bench's engine of transformers and PEFT: a step as their users, and TRL, write it (io).

Rows of GRPO are a prompt with one of its completions, so that prompts are computed once per completion; the head is asked
for the completions' logits alone (`logits_to_keep`); the reference is the adapter switched off.
"""

from __future__ import annotations

import resource
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from sif_jax.bench.train_workload import (
    CLIP,
    KL_BETA,
    LEARNING_RATE,
    MAX_GRAD_NORM,
    Completed,
    Stage,
    TrainWork,
    make_work,
)
from sif_jax.bench.transformers_model import load_transformers, on_device, open_torch, prompt_inputs
from sif_jax.bench.worker import Stepped
from sif_jax.config import TrainBenchConfig
from sif_jax.errors import InputError
from sif_jax.models.qwen2_5_vl.config import Qwen2_5_VLConfig


class TransformersTraining:
    def __init__(self, config: TrainBenchConfig, checkpoint: Path, adapter: Path, stage: Stage) -> None:
        """
        Raises:
          InputError: PyTorch or PEFT is not installed.
        """
        self._torch, self._config = open_torch(), config
        try:
            from peft import PeftModel
        except ImportError:
            raise InputError("the comparison needs PEFT", expected="peft", fix="pip install peft") from None
        # PEFT, and older versions of transformers, know these names alone.
        warnings.filterwarnings("ignore", message="`(is_)?gradient_checkpointing", category=FutureWarning)
        base = load_transformers(checkpoint, config.dtype)
        base.config.use_cache = False
        checkpointing = config.remat != "none" if config.hf_checkpointing is None else config.hf_checkpointing
        if checkpointing:
            base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            base.enable_input_require_grads()
        self._model: Any = PeftModel.from_pretrained(base, adapter, is_trainable=True).train()
        self._architecture = Qwen2_5_VLConfig.from_directory(checkpoint)
        self._work = make_work(config, self._architecture, stage)
        self._trained = [value for value in self._model.parameters() if value.requires_grad]
        self._optimizer = self._torch.optim.AdamW(self._trained, lr=LEARNING_RATE, weight_decay=0.0)

    def step(self) -> Stepped:
        """From arrays on the host to updated weights."""
        loss = self._sft(self._work) if self._work.completed is None else self._grpo(self._work, self._work.completed)
        norm = self._torch.nn.utils.clip_grad_norm_(self._trained, MAX_GRAD_NORM)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        if self._model.device.type == "cuda":
            self._torch.cuda.synchronize()
        return Stepped(loss, float(norm))

    def figures(self) -> dict[str, Any]:
        cuda = self._torch.cuda
        held = cuda.max_memory_allocated() if cuda.is_available() else None
        peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss if held is None else held
        return {"peak_bytes": peak, "versions": _versions()}

    def _sft(self, work: TrainWork) -> float:
        arrays = prompt_inputs(work.batch, self._architecture)
        labels = np.where(work.batch["loss_mask"] > 0, arrays["input_ids"], -100)
        loss = self._model(**on_device(arrays | {"labels": labels}, self._model)).loss
        loss.backward()
        return float(loss.detach())

    def _grpo(self, work: TrainWork, completed: Completed) -> float:
        count, total = completed.advantages.size, 0.0
        size = self._config.hf_rows or count
        for start in range(0, count, size):
            rows = np.arange(start, start + size)
            loss = self._policy_loss(work, completed, rows) * (size / count)
            loss.backward()
            total += float(loss.detach())
        return total

    def _policy_loss(self, work: TrainWork, completed: Completed, rows: np.ndarray) -> Any:
        """The mean over completions of the mean over their tokens of β KL - min(ρ A, clip(ρ) A), with the k3 estimate."""
        torch = self._torch
        inputs, ids, mask = self._completions(work, completed, rows)
        with torch.no_grad(), self._model.disable_adapter():
            reference = self._logprobs(inputs, ids)
        logprobs = self._logprobs(inputs, ids)
        gain = torch.from_numpy(completed.advantages.reshape(-1)[rows]).to(ids.device)[:, None]
        ratio = torch.exp(logprobs - logprobs.detach())
        surrogate = torch.minimum(ratio * gain, ratio.clamp(1 - CLIP, 1 + CLIP) * gain)
        gap = reference - logprobs
        tokens = KL_BETA * (torch.exp(gap) - gap - 1) - surrogate
        return ((tokens * mask).sum(-1) / mask.sum(-1)).mean()

    def _completions(self, work: TrainWork, completed: Completed, rows: np.ndarray) -> tuple[dict[str, Any], Any, Any]:
        """Inputs of the rows, prompt and completion one after the other; the completions and their mask."""
        samples = completed.ids.shape[1]
        prompts = {name: array[rows // samples] for name, array in work.batch.items()}
        arrays = prompt_inputs(prompts, self._architecture)
        ids, mask = (x.reshape(-1, x.shape[-1])[rows].astype(np.int64) for x in (completed.ids, completed.mask))
        for name, own in [("input_ids", ids), ("attention_mask", mask), ("mm_token_type_ids", np.zeros_like(ids))]:
            arrays[name] = np.concatenate([arrays[name], own], axis=1)
        inputs = on_device(arrays, self._model)
        return inputs, *(inputs[name][:, -ids.shape[1] :] for name in ("input_ids", "attention_mask"))

    def _logprobs(self, inputs: dict[str, Any], ids: Any) -> Any:
        logits = self._model(**inputs, logits_to_keep=ids.shape[1] + 1).logits[:, :-1]
        chosen = logits.gather(-1, ids[..., None])[..., 0].float()
        return chosen - self._torch.stack([row.float().logsumexp(-1) for row in logits])


def _versions() -> dict[str, str]:
    import peft
    import torch
    import transformers

    return {module.__name__: module.__version__ for module in (torch, transformers, peft)}
