"""From sampled tokens to rewards and advantages (io)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, wait
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped

from sif_jax.config import GrpoConfig
from sif_jax.data.feed import Feed
from sif_jax.judge import Judge, Judged, JudgeStoppedError
from sif_jax.models.qwen2_5_vl.chat import ChatProcessor
from sif_jax.parallel.distributed import gather_json, own_run, raise_together
from sif_jax.rewards.advantages import advantages
from sif_jax.rewards.scoring import Scores, score
from sif_jax.rollout.engine import Rollout
from sif_jax.rollout.text import decode_rollout
from sif_jax.training.exchange import gather_judgements

POLL_S = 0.5
TERMS = ("format", "answer", "bbox", "depth", "total")


@dataclasses.dataclass(frozen=True)
class Submitted:
    """A rollout of P prompts × M samples that the judge is at work on; flat, prompt by prompt.

    Of several processes, each judges and scores its own run of the completions.
    """

    completions: list[str]
    indices: Int[np.ndarray, " completion"]  # each completion's record
    own: slice
    judged: Future[Judged]  # of the own ones


@dataclasses.dataclass(frozen=True)
class Feedback:
    """What a rollout of P prompts × M samples earned; scores are flat, prompt by prompt."""

    completions: list[str]
    datasets: Sequence[str]  # of each prompt
    judged: Float[np.ndarray, "P M"]
    scores: Scores
    advantages: Float[np.ndarray, "P M"]
    counters: Mapping[str, float]  # the judge's

    def means_after(
        self, previous_means: Float[np.ndarray, " P"], compat: Literal["paper", "release"]
    ) -> Float[np.ndarray, " P"]:
        """The baseline of each prompt's next visit: the mean raw judge score of its group; without a judgement what it was.

        The release keeps one number for all prompts of a step, the mean of their answer terms, progress included.
        """
        if compat == "release":
            valid = self.scores.valid
            return np.full_like(previous_means, self.scores.answer[valid].mean()) if valid.any() else previous_means
        judged = np.isfinite(self.judged)
        means = np.where(judged, self.judged, 0).sum(axis=1) / np.maximum(judged.sum(axis=1), 1)
        return np.where(judged.any(axis=1), means, previous_means)

    def metrics(self) -> dict[str, float]:
        """Means and within-group spreads over judged completions, and how many groups and completions teach nothing."""
        groups, valid = self.judged.shape, self.scores.valid.reshape(self.judged.shape)
        values = {term: getattr(self.scores, term).reshape(groups) for term in TERMS}
        by_dataset = {name: valid & (np.array(self.datasets) == name)[:, None] for name in sorted(set(self.datasets))}
        return (
            {f"reward/{term}": _mean(value, valid) for term, value in values.items()}
            | {f"spread/{term}": _spread(value, valid) for term, value in values.items()}
            | {f"dataset/{name}": _mean(values["total"], where) for name, where in by_dataset.items()}
            | {
                "judge": _mean(self.judged, valid),
                "hiou_last": _mean(self.scores.hiou_last.reshape(groups), valid),
                "groups_without_signal": float((self.advantages == 0).all(axis=1).mean()),
                "masked": float(1 - valid.mean()),
            }
            | dict(self.counters)
        )


def _mean(values: Shaped[np.ndarray, "P M"], where: Bool[np.ndarray, "P M"]) -> float:
    return float(values[where].mean()) if where.any() else math.nan


def _spread(values: Shaped[np.ndarray, "P M"], valid: Bool[np.ndarray, "P M"]) -> float:
    """Mean over groups of the standard deviation within the group."""
    spreads = [group[judged].std() for group, judged in zip(values, valid, strict=True) if judged.any()]
    return float(np.mean(spreads)) if spreads else math.nan


def submit_rollout(
    judge: Judge, rollout: Rollout, feed: Feed, ids: Int[np.ndarray, " P"], processor: ChatProcessor
) -> Submitted:
    """Decode the completions and give them to the judge, without waiting for it."""
    completions = decode_rollout(rollout, processor)
    indices = np.repeat(ids, rollout.lengths.shape[1])
    own = own_run(len(completions))
    records = [feed.records[index] for index in indices[own]]
    return Submitted(completions, indices, own, judge.submit(completions[own], records, feed.file.image_root))


def reward_rollout(
    submitted: Submitted,
    feed: Feed,
    previous_means: Float[np.ndarray, " P"],
    config: GrpoConfig,
    *,
    meanwhile: Callable[[], None] | None = None,
) -> Feedback:
    """Wait for the judge, and score every completion against its prompt's record.

    `meanwhile` is called every now and then, as often on every process; what it raises ends the wait.

    Raises:
      JudgeStoppedError: judging cannot go on.
    """
    own, samples = submitted.own, config.num_samples
    judged, counters = _wait_together(submitted.judged, meanwhile)
    indices = submitted.indices[own]
    scores = score(
        submitted.completions[own],
        [feed.records[index] for index in indices],
        judge_scores=judged,
        previous_means=np.repeat(previous_means, samples)[own],
        depth_maps=feed.depth_maps(indices),
        rewards=config.rewards,
    )
    judged, scores, counters = gather_judgements(judged, scores, counters)
    earned = advantages(
        scores,
        config.rewards,
        num_samples=samples,
        eps=config.advantage_eps,
        divide_by_std=config.objective.kind != "dr_grpo",
    )
    datasets = [feed.records[index].dataset for index in submitted.indices[::samples]]
    return Feedback(submitted.completions, datasets, judged.reshape(-1, samples), scores, earned, counters)


def _wait_together(judged: Future[Judged], meanwhile: Callable[[], None] | None) -> Judged:
    """The own judgements, once every process has its own.

    Raises:
      JudgeStoppedError: on every process, where judging cannot go on for one of them.
    """
    while not all(gather_json(judged.done())):
        if meanwhile is not None:
            meanwhile()
        wait([judged], timeout=POLL_S)
    try:
        result, stopped = judged.result(), None
    except JudgeStoppedError as error:
        result, stopped = None, error
    raise_together(stopped, JudgeStoppedError)
    assert result is not None
    return result
