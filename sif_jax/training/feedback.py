"""From sampled tokens to rewards and advantages (io)."""

from __future__ import annotations

import dataclasses

import numpy as np
from jaxtyping import Float, Int

from sif_jax.config import GrpoConfig
from sif_jax.data.feed import Feed
from sif_jax.judge.completions import judge_completions
from sif_jax.models.qwen2_5_vl.chat import ChatProcessor
from sif_jax.rewards import advantages, score
from sif_jax.rewards.scoring import Scores
from sif_jax.rollout.engine import Rollout
from sif_jax.rollout.text import decode_rollout

TERMS = ("format", "answer", "bbox", "depth", "total")


@dataclasses.dataclass(frozen=True)
class Feedback:
    """What a rollout of P prompts × M samples earned; scores are flat, prompt by prompt."""

    completions: list[str]
    judged: Float[np.ndarray, "P M"]
    scores: Scores
    advantages: Float[np.ndarray, "P M"]

    @property
    def group_means(self) -> Float[np.ndarray, " P"]:
        """Mean raw judge score of each group, the baseline of its next visit."""
        return np.nanmean(self.judged, axis=1)

    def metrics(self) -> dict[str, float]:
        """Means and mean within-group spread of each term, and how many groups and completions teach nothing."""
        groups = self.judged.shape
        values = {term: getattr(self.scores, term).reshape(groups) for term in TERMS}
        return (
            {f"reward/{term}": float(value.mean()) for term, value in values.items()}
            | {f"spread/{term}": float(value.std(axis=1).mean()) for term, value in values.items()}
            | {
                "groups_without_signal": float((values["total"].std(axis=1) == 0).mean()),
                "masked": float(1 - self.scores.valid.mean()),
                "hiou_last": float(self.scores.hiou_last.mean()),
                "judge": float(np.nanmean(self.judged)),
            }
        )


def judge_rollout(
    rollout: Rollout,
    feed: Feed,
    ids: Int[np.ndarray, " P"],
    previous_means: Float[np.ndarray, " P"],
    processor: ChatProcessor,
    config: GrpoConfig,
) -> Feedback:
    """Decode, judge and score every completion against its prompt's record."""
    groups = rollout.lengths.shape
    completions = decode_rollout(rollout, processor)
    repeated = np.repeat(ids, groups[1])
    records = [feed.records[index] for index in repeated]
    judged = judge_completions(completions, records)
    scores = score(
        completions,
        records,
        judge_scores=judged,
        previous_means=np.repeat(previous_means, groups[1]),
        depth_maps=feed.depth_maps(repeated),
        rewards=config.rewards,
    )
    earned = advantages(scores, config.rewards, num_samples=groups[1], eps=config.advantage_eps)
    return Feedback(completions, judged.reshape(groups), scores, earned)
