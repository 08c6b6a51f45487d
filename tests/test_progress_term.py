"""The answer's progress over a whole run: each prompt is held against the raw mean of its own last judged visit."""

import warnings
import zlib
from collections.abc import Sequence

import numpy as np
import pytest

from sif_jax.config import GrpoConfig, RewardsConfig
from sif_jax.judge import completions as judging
from sif_jax.rewards.scoring import score
from sif_jax.sif.record import Record
from sif_jax.training import grpo
from sif_jax.training.checkpoint import Checkpoints
from sif_jax.training.feedback import Feedback
from tests.test_score import LEFT, record
from tests.test_sft import interrupt
from tests.tiny_run import tiny_config

pytestmark = pytest.mark.xdist_group("progress_term")  # its fixtures are slow: made once, not by each worker

SAMPLES = 3
# Six prompts, two a step in accumulated halves: three shuffled visits to each.
SETTINGS = ["data.limit=6", "prompts_per_step=2", "micro_batch=1", f"num_samples={SAMPLES}", "max_steps=9"]


def judge(completions: Sequence[str], records: Sequence[Record]) -> np.ndarray:
    """An opinion on any text; one in five judgements fails, and one in three groups fails whole."""

    def hashed(*words: str) -> int:
        return zlib.crc32("".join(words).encode())

    scores = np.array([hashed(*pair) % 1000 / 1000 for pair in zip(completions, [r.image for r in records])])
    scores[[hashed(completion, record.problem) % 5 == 0 for completion, record in zip(completions, records)]] = np.nan
    for start in range(0, len(scores), SAMPLES):
        if hashed(*completions[start : start + SAMPLES], records[start].problem) % 3 == 0:
            scores[start : start + SAMPLES] = np.nan
    return scores


def run(root, monkeypatch, *, cut_before_saving: int | None = None) -> list[tuple[list[int], np.ndarray, Feedback]]:
    """(prompts, previous means, feedback) of every step that ran."""
    seen, original = [], grpo.reward_rollout

    def watched(submitted, feed, previous_means, config, **options):
        feedback = original(submitted, feed, previous_means, config, **options)
        seen.append((submitted.indices[::SAMPLES].tolist(), np.array(previous_means), feedback))
        return feedback

    monkeypatch.setattr(judging, "judge_completions", judge)
    monkeypatch.setattr(grpo, "reward_rollout", watched)
    config = tiny_config(GrpoConfig, root, *SETTINGS, "run.save_every=4")
    with monkeypatch.context() as patch:
        if cut_before_saving is None:
            grpo.train(config)
        else:
            interrupt(patch, Checkpoints, "save", cut_before_saving)
            with pytest.raises(KeyboardInterrupt):
                grpo.train(config)
    monkeypatch.setattr(grpo, "reward_rollout", original)
    return seen


@pytest.fixture(scope="module")
def steps(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        return run(tmp_path_factory.mktemp("whole"), patch)


def test_every_visit_is_held_against_the_raw_mean_of_the_last_judged_one(steps):
    last, visits = {}, []
    for prompts, previous_means, feedback in steps:
        answers = feedback.scores.answer.reshape(-1, SAMPLES)
        for row, prompt in enumerate(prompts):
            scores, previous = feedback.judged[row], last.get(prompt, np.nan)
            np.testing.assert_allclose(previous_means[row], previous, rtol=1e-6)
            gain = 0 if np.isnan(previous) else scores - previous
            np.testing.assert_allclose(answers[row], np.where(np.isnan(scores), 0, scores + gain), atol=1e-6)
            if not np.isnan(scores).all():
                last[prompt] = scores[~np.isnan(scores)].mean()
            visits.append((prompt, np.isnan(scores).all(), np.isnan(previous)))
    assert [prompt for prompt, _, _ in visits[:6]] != [prompt for prompt, _, _ in visits[6:12]], "shuffled"
    assert {prompt: sum(visit[0] == prompt for visit in visits) for prompt in range(6)} == dict.fromkeys(range(6), 3)
    assert {(failed, first) for _, failed, first in visits} == {
        (True, True),
        (True, False),
        (False, True),
        (False, False),
    }


def test_a_group_whose_judgements_all_failed_teaches_nothing(steps):
    for _, _, feedback in steps:
        failed = np.isnan(feedback.judged)
        assert (feedback.advantages[failed] == 0).all()
        assert np.isfinite(feedback.advantages).all()


def test_the_means_survive_a_cut_and_a_resume(tmp_path, monkeypatch, steps):
    # Cut before the checkpoint after step 8 is written: the resumed run takes up at step 4.
    before = run(tmp_path, monkeypatch, cut_before_saving=8)
    resumed = run(tmp_path, monkeypatch)
    assert (len(before), len(resumed)) == (8, 5)
    for (prompts, previous_means, feedback), (expected_prompts, expected_means, expected) in zip(
        before[:4] + resumed, steps, strict=True
    ):
        assert prompts == expected_prompts
        np.testing.assert_array_equal(previous_means, expected_means)
        np.testing.assert_array_equal(feedback.judged, expected.judged)
        np.testing.assert_array_equal(feedback.scores.answer, expected.scores.answer)


def test_a_group_mean_leaves_failures_out_and_an_all_failed_group_keeps_its_own():
    nan = np.nan
    judged = np.array([[0.5, 1.0], [0.25, nan], [nan, nan], [nan, nan]])
    scores = score([], [], judge_scores=[])
    feedback = Feedback([], [], judged, scores, np.zeros((4, 2)), {})
    with warnings.catch_warnings(action="error"):
        np.testing.assert_array_equal(
            feedback.means_after(np.array([0.0, 0.0, 0.75, nan]), "paper"), [0.75, 0.25, 0.75, nan]
        )


def test_the_release_keeps_one_boosted_mean_for_every_prompt_of_a_step():
    """Second visit: the first, judged 1, gains 1 - 0.5 over its baseline; the second, judged 0, loses nothing; one failed."""
    scores = score(
        ["<answer>it</answer>"] * 3,
        [record(LEFT)] * 3,
        judge_scores=[1.0, 0.0, float("nan")],
        previous_means=[0.5, 0.5, 0.5],
        rewards=RewardsConfig(compat="release"),
    )
    feedback = Feedback([], [], np.array([[1.0], [0.0], [np.nan]]), scores, np.zeros((3, 1)), {})
    before = np.full(3, 0.5, np.float32)
    np.testing.assert_allclose(feedback.means_after(before, "release"), [0.75] * 3)
    np.testing.assert_allclose(feedback.means_after(before, "paper"), [1.0, 0.0, 0.5])
