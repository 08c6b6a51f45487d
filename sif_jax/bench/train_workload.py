"""What both engines of the training bench are given: one batch of rows, or of prompts with completions (pure)."""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from sif_jax.bench.workload import random_batch
from sif_jax.config import TrainBenchConfig
from sif_jax.models.qwen2_5_vl.config import Qwen2_5_VLConfig

Stage = Literal["sft", "grpo"]
KL_BETA, CLIP, TEMPERATURE = 0.04, 0.2, 1.0
LEARNING_RATE, MAX_GRAD_NORM = 1e-5, 1.0


class Completed(NamedTuple):
    """Completions of every prompt, as a rollout would have left them."""

    ids: Int[np.ndarray, "P M T"]
    mask: Bool[np.ndarray, "P M T"]
    advantages: Float[np.ndarray, "P M"]


class TrainWork(NamedTuple):
    batch: dict[str, np.ndarray]  # full rows: no padding
    completed: Completed | None  # GRPO

    @property
    def tokens(self) -> int:
        """What tokens per second count: every token of SFT's rows, the completions' of GRPO."""
        return self.batch["tokens"].size if self.completed is None else int(self.completed.mask.sum())


def make_work(config: TrainBenchConfig, architecture: Qwen2_5_VLConfig, stage: Stage) -> TrainWork:
    if stage == "sft":
        batch = random_batch(architecture, rows=config.rows, tokens=config.tokens, image_px=config.image_px)
        return TrainWork(batch, None)
    batch = random_batch(architecture, rows=config.prompts, tokens=config.prompt_tokens, image_px=config.image_px)
    return TrainWork(batch, _completed(config, architecture.image_token_id))


def _completed(config: TrainBenchConfig, vocab: int) -> Completed:
    """Lengths spread evenly, in random order; advantages of mean 0 and deviation 1 in each group."""
    rng, shape = np.random.default_rng(config.seed), (config.prompts, config.samples)
    lengths = np.linspace(config.min_new_tokens, config.max_new_tokens, config.prompts * config.samples)
    lengths = rng.permutation(lengths.round().astype(np.int32)).reshape(shape)
    ids = rng.integers(0, vocab, (*shape, config.max_new_tokens)).astype(np.int32)
    rewards = rng.normal(size=shape)
    advantages = (rewards - rewards.mean(1, keepdims=True)) / rewards.std(1, keepdims=True)
    return Completed(ids, np.arange(config.max_new_tokens) < lengths[..., None], advantages.astype(np.float32))
