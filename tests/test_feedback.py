"""From judged completions to rewards, advantages and the figures that are logged: failed judgements count nowhere."""

import dataclasses
from concurrent.futures import Future

import numpy as np
import pytest

from sif_jax.judge import Judged
from sif_jax.training import grpo
from sif_jax.training.feedback import TERMS, Feedback, Submitted
from tests.test_grpo import config, open_all


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    settings = config(tmp_path_factory.mktemp("feed"))
    _, feed, _, ids = open_all(settings)
    return settings, feed, ids


def feedback_of(opened, judged: np.ndarray, *overrides: str) -> Feedback:
    """What completions of nothing but an answer earn: the judge's score."""
    settings, feed, ids = opened
    settings = config(settings.run.directory.parent, f"num_samples={judged.shape[1]}", *overrides)
    indices = np.repeat(ids, judged.shape[1])
    answer: Future[Judged] = Future()
    answer.set_result(Judged(judged.reshape(-1), {"judge/calls": 3.0}))
    submitted = Submitted(["<answer>it</answer>"] * judged.size, indices, slice(None), answer)
    return grpo.reward_rollout(submitted, feed, np.full(len(ids), np.nan, np.float32), settings)


def test_a_failed_judgement_is_out_of_the_mean_the_deviation_and_the_loss_and_is_counted(opened):
    judged = np.tile([0.0, 0.5, 1.0, np.nan], (4, 1))
    masked, without = feedback_of(opened, judged), feedback_of(opened, judged[:, :3])
    np.testing.assert_array_equal(masked.advantages[:, :3], without.advantages)
    assert (masked.advantages[:, 3] == 0).all()
    ours, theirs = masked.metrics(), without.metrics()
    assert (ours.pop("masked"), theirs.pop("masked")) == (0.25, 0)
    assert ours == pytest.approx(theirs)
    assert ours["judge"] == pytest.approx(0.5)
    assert ours["judge/calls"] == 3


def test_dr_grpo_centres_rewards_and_does_not_divide_by_their_deviation(opened):
    judged = np.tile([0.0, 0.2, 1.0, np.nan], (4, 1))
    feedback = feedback_of(opened, judged, "objective.kind=dr_grpo")
    np.testing.assert_allclose(feedback.advantages, np.tile([-0.4, -0.2, 0.6, 0.0], (4, 1)), atol=1e-6)


def synthetic(opened, **values) -> Feedback:
    """Feedback of 4 prompts × 3 samples with these scores; all else as of silent completions."""
    judged = values.pop("judged")
    feedback = feedback_of(opened, np.zeros((4, 3)))
    advantages = values.pop("advantages")
    scores = dataclasses.replace(feedback.scores, **{name: value.reshape(-1) for name, value in values.items()})
    return dataclasses.replace(
        feedback, scores=scores, judged=judged, advantages=advantages, datasets=["gqa", "cub", "cub", "vsr"]
    )


def test_the_metrics_of_four_groups_by_hand(opened):
    row = synthetic(
        opened,
        total=np.array([[1.0, 2.0, 9.0], [1.0, 1.0, 1.0], [2.0, 2.0, 5.0], [9.0, 9.0, 9.0]]),
        valid=np.array([[1, 1, 0], [1, 1, 1], [1, 1, 1], [0, 0, 0]], bool),
        judged=np.array([[1.0, 0.0, np.nan], [0.5, 0.5, 0.5], [0.0, 0.0, 1.0], [np.nan] * 3]),
        advantages=np.array([[-1.0, 1.0, 0.0], [0.0, 0.0, 0.0], [-1.0, -1.0, 2.0], [0.0, 0.0, 0.0]]),
    ).metrics()
    assert row["reward/total"] == pytest.approx((1 + 2 + 3 + 9) / 8)
    assert row["spread/total"] == pytest.approx((0.5 + 0 + np.sqrt(2)) / 3)
    assert (row["dataset/gqa"], row["dataset/cub"]) == (1.5, 2.0)
    assert np.isnan(row["dataset/vsr"])
    assert row["judge"] == pytest.approx(3.5 / 8)
    assert row["groups_without_signal"] == 0.5
    assert row["masked"] == pytest.approx(4 / 12)


def test_a_rollout_without_one_judgement_has_no_means_and_warns_of_nothing(opened):
    row = feedback_of(opened, np.full((4, 3), np.nan)).metrics()
    assert (row["masked"], row["groups_without_signal"]) == (1, 1)
    assert all(np.isnan(row[f"{kind}/{term}"]) for kind in ("reward", "spread") for term in TERMS)
