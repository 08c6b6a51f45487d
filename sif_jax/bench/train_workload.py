"""What both engines of the training bench are given: one batch of rows, or of prompts with completions (pure)."""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from sif_jax.bench.workload import in_rows, random_batch, random_examples
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
    batch: dict[str, np.ndarray]  # one example, or prompt, in each row
    packed: dict[str, np.ndarray] | None = None  # the same examples in fewer rows, where they are not equally long
    completed: Completed | None = None  # GRPO

    @property
    def tokens(self) -> int:
        """What tokens per second count, padding left out: every token of SFT's examples, the completions' of GRPO."""
        return int((self.batch["segments"] > 0).sum() if self.completed is None else self.completed.mask.sum())


def make_work(config: TrainBenchConfig, architecture: Qwen2_5_VLConfig, stage: Stage) -> TrainWork:
    if stage == "grpo":
        batch = random_batch(architecture, rows=config.prompts, tokens=config.prompt_tokens, image_px=config.image_px)
        return TrainWork(batch, completed=_completed(config, architecture.image_token_id))
    shortest = config.tokens if config.min_tokens is None else config.min_tokens
    lengths = _spread(config, shortest, config.tokens, config.rows).tolist()
    examples = random_examples(architecture, lengths, image_px=config.image_px)
    packed = None if config.min_tokens is None else in_rows(architecture, examples, tokens=config.tokens, pack=True)
    return TrainWork(in_rows(architecture, examples, tokens=config.tokens), packed)


def _completed(config: TrainBenchConfig, vocab: int) -> Completed:
    """Advantages of mean 0 and deviation 1 in each group."""
    rng, shape = np.random.default_rng(config.seed), (config.prompts, config.samples)
    lengths = _spread(config, config.min_new_tokens, config.max_new_tokens, config.prompts * config.samples).reshape(
        shape
    )
    ids = rng.integers(0, vocab, (*shape, config.max_new_tokens)).astype(np.int32)
    rewards = rng.normal(size=shape)
    advantages = (rewards - rewards.mean(1, keepdims=True)) / rewards.std(1, keepdims=True)
    return Completed(ids, np.arange(config.max_new_tokens) < lengths[..., None], advantages.astype(np.float32))


def _spread(config: TrainBenchConfig, shortest: int, longest: int, count: int) -> Int[np.ndarray, "N"]:
    """Lengths evenly from the shortest to the longest, in random order."""
    lengths = np.linspace(shortest, longest, count).round().astype(np.int32)
    return np.random.default_rng(config.seed).permutation(lengths)
