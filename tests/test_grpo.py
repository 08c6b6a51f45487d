"""GRPO-SIF as a whole: what is rewarded becomes likelier, micro-batches change nothing, a cut run resumes bit for bit."""

import os
import re
import subprocess
import sys
import threading
import zlib
from concurrent.futures import Future
from fnmatch import fnmatch
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sif_jax.config import GrpoConfig
from sif_jax.data.feed import open_feed
from sif_jax.judge import JudgeStoppedError, RuleJudge
from sif_jax.judge import completions as judging
from sif_jax.models.qwen2_5_vl.checkpoint import open_model
from sif_jax.models.qwen2_5_vl.layer_arrays import take_apart
from sif_jax.models.qwen2_5_vl.lora import split_trainable
from sif_jax.parallel.mesh import data_mesh
from sif_jax.rollout.sampling import sample_keys
from sif_jax.training import grpo, policy_files
from sif_jax.training.checkpoint import Checkpoints
from sif_jax.training.metrics import MetricsLog, read_metrics
from sif_jax.training.policy import completion_logprobs
from sif_jax.training.policy_files import open_policy
from sif_jax.training.reference import reference_logprobs, reference_of
from tests.conftest import ROOT
from tests.test_sft import interrupt
from tests.tiny_run import assert_same_weights, changed_weights, measured, tiny_config, weights


def config(root, *overrides: str) -> GrpoConfig:
    return tiny_config(GrpoConfig, root, *overrides)


def train(root, *overrides: str):
    return grpo.train(config(root, *overrides))


def opinion(completion: str, record) -> float:
    """A judge with an opinion on any text, as a random model never answers well."""
    return zlib.crc32(f"{completion}{record.problem}".encode()) % 1000 / 1000


@pytest.fixture(autouse=True)
def judged(monkeypatch):
    """Replaces the judge; every call's scores are kept."""
    calls = []

    def judge(completions, records):
        calls.append(np.array([opinion(*pair) for pair in zip(completions, records, strict=True)]))
        return calls[-1]

    monkeypatch.setattr(judging, "judge_completions", judge)
    return calls


@pytest.fixture
def visits(monkeypatch):
    """(prompt ids, previous means, feedback) of every rollout."""
    seen, original = [], grpo.reward_rollout

    def watched(submitted, feed, previous_means, config, **settings):
        result = original(submitted, feed, previous_means, config, **settings)
        seen.append((submitted.indices[:: config.num_samples], np.array(previous_means), result))
        return result

    monkeypatch.setattr(grpo, "reward_rollout", watched)
    return seen


EPOCHS = ["data.limit=4", "max_steps=3", "run.save_every=2"]  # every step visits all four prompts


@pytest.mark.slow
def test_a_run_without_the_completions_padding_learns_what_one_with_it_does(tmp_path):
    short = ["lora={rank: 2, dropout: 0.1}", "data.limit=4", "max_steps=2", "stop=['e']"]
    packed = train(tmp_path / "packed", *short)
    padded = train(tmp_path / "padded", *short, "remove_padding=false")
    rows, others = read_metrics(packed), read_metrics(padded)
    for row, other in zip(rows, others, strict=True):
        assert row["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)
        assert row["completion_length"] == other["completion_length"]
        assert row["padding/completions"] < other["padding/completions"] - 0.1
    for name, value in weights(packed).items():
        np.testing.assert_allclose(value, weights(padded)[name], atol=1e-4, err_msg=name)


@pytest.mark.slow
def test_layers_that_are_arrays_of_their_own_train_the_same_policy(tmp_path, monkeypatch):
    short, taken = ["lora={rank: 2, dropout: 0.1}", "data.limit=4", "max_steps=2", "model.remat=dots"], []
    monkeypatch.setattr(policy_files, "take_apart", lambda frozen: taken.append(frozen) or take_apart(frozen))
    stacked = train(tmp_path / "stacked", *short)
    assert not taken
    apart = train(tmp_path / "apart", *short, "model.scan_layers=false")
    assert len(taken) == 1
    assert measured(stacked) == measured(apart)
    assert_same_weights(stacked, apart)


@pytest.fixture(scope="module")
def three_steps(tmp_path_factory):
    root = tmp_path_factory.mktemp("three")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(judging, "judge_completions", lambda *both: np.array([opinion(*x) for x in zip(*both)]))
        return train(root, *EPOCHS)


def open_all(settings: GrpoConfig):
    """(policy, feed, the first prompts as arrays, their record indices)."""
    policy = open_policy(settings.model, lora=settings.lora, freeze_vision=settings.freeze_vision, seed=0)
    feed = open_feed(
        settings.data,
        settings.prompt,
        policy.processor,
        policy.config.vision,
        target="none",
        batch_size=settings.prompts_per_step,
    )
    prompts = next(feed.loader)
    return policy, feed, jax.tree.map(jnp.asarray, prompts.arrays), np.array([index for (index,) in prompts.records])


def test_a_step_makes_the_better_samples_likelier_and_the_worse_ones_less_likely(tmp_path):
    settings = config(tmp_path, "objective.kl_beta=0")
    policy, _, batch, ids = open_all(settings)
    keys = sample_keys(settings.run.seed, 0, ids, settings.num_samples)
    rollout, features, _ = grpo.sample(policy, (policy.trainable, policy.frozen), batch, keys, settings)
    shape = rollout.lengths.shape
    advantages = np.broadcast_to(np.array([1.0, 0.0, -1.0], np.float32), shape)
    completions = grpo.to_learn(batch, features, rollout, settings)
    groups = grpo.Groups(completions, None, jnp.asarray(advantages), jnp.ones(shape, bool))
    gradients, sums = grpo.make_gradients(policy.graphdef, settings)(
        None, policy.trainable, policy.frozen, groups, jax.random.key(0)
    )
    gradients = jax.tree.map(lambda g: g / sums.policy.count, gradients)
    assert float(sums.policy.ratio_max) == 1

    @jax.jit
    def likelihood(trainable):
        model = nnx.merge(policy.graphdef, trainable, policy.frozen, copy=True)
        logprobs, _ = completion_logprobs(model, batch, features, completions.ids, temperature=1.0)
        return jnp.sum(logprobs * completions.token_mask, axis=-1)

    stepped = jax.tree.map(lambda w, g: w - 0.05 * g, policy.trainable, gradients)
    gain = np.asarray(likelihood(stepped) - likelihood(policy.trainable))
    assert (gain[:, 0] > gain[:, 2]).all()
    assert gain[:, 0].mean() > 0 > gain[:, 2].mean()


def test_on_policy_nothing_is_clipped_and_the_kl_starts_at_zero(tmp_path):
    first, second = read_metrics(train(tmp_path, "max_steps=2", "optimizer.learning_rate=1.0e-2"))
    assert first["kl"] == pytest.approx(0, abs=1e-9)
    assert second["kl"] > 1e-6
    for row in (first, second):
        assert row["clip_fraction"] == 0
        assert row["ratio_mean"] == row["ratio_max"] == 1
        assert 0 < row["sampler_gap"] < 1e-4, "sampler and trainer compute the same numbers in another order"
        assert row["sampler_ratio_mean"] == pytest.approx(1, abs=1e-4)
        assert 1 <= row["sampler_ratio_max"] < 1 + 1e-3
        assert row["sampler_effective_share"] == pytest.approx(1, abs=1e-5)
        assert 0 <= row["padding/row_steps"] < 1
    assert first["grad_norm"] > 0
    assert first["judge"] == pytest.approx(0.5, abs=0.35)


@pytest.mark.slow
def test_in_bfloat16_every_step_says_how_far_sampler_and_trainer_drift_apart(tmp_path):
    rows = read_metrics(train(tmp_path, "max_steps=2", "model.dtype=bfloat16", "lora={rank: 2, dropout: 0.0}"))
    assert len(rows) == 2
    for row in rows:  # how far is the compiler's matter: on a CPU jax 0.10.2 gives about 1e-3, jax 0.11.2 about 1e-7
        assert 0 < row["sampler_gap"] < 0.1
        assert row["sampler_ratio_max"] > row["sampler_ratio_mean"] > 0.9
        assert 0.9 < row["sampler_effective_share"] <= 1 + 1e-6


@pytest.mark.parametrize("frozen", [True, False])
def test_image_features_are_kept_for_scoring_only_while_the_tower_is_frozen(tmp_path, frozen):
    settings = config(tmp_path, f"freeze_vision={str(frozen).lower()}")
    policy, _, batch, ids = open_all(settings)
    keys = sample_keys(settings.run.seed, 0, ids, settings.num_samples)
    rollout, features, _ = grpo.sample(policy, (policy.trainable, policy.frozen), batch, keys, settings)
    kept = grpo.to_learn(batch, features, rollout, settings).features
    assert (kept is features) if frozen else (kept is None)


def test_few_rows_at_a_time_sample_what_all_rows_at_once_do(tmp_path):
    settings = config(tmp_path, "decode_rows=5", "micro_batch=2")
    policy, _, batch, ids = open_all(settings)
    keys = sample_keys(settings.run.seed, 0, ids, settings.num_samples)
    states = (policy.trainable, policy.frozen)
    few, _, usage = grpo.sample(policy, states, batch, keys, settings)
    whole, _, _ = grpo.sample(policy, states, batch, keys, settings.model_copy(update={"decode_rows": None}))
    np.testing.assert_array_equal(few.ids, whole.ids)
    np.testing.assert_allclose(few.logprobs, whole.logprobs, atol=1e-5)
    assert usage.tokens == int(whole.lengths.sum())


@pytest.mark.slow
def test_the_size_of_a_micro_batch_changes_nothing(tmp_path):
    update = ["max_steps=1", "optimizer.eps=1.0", "optimizer.learning_rate=1.0"]
    whole = train(tmp_path / "whole", "micro_batch=4", *update)
    halves = train(tmp_path / "halves", "micro_batch=2", *update)
    one, other = read_metrics(whole)[0], read_metrics(halves)[0]
    assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-5)
    expected = weights(whole)
    assert len(changed_weights(whole)) > 10
    for name, value in weights(halves).items():
        np.testing.assert_allclose(value, expected[name], atol=1e-5, err_msg=name)


def test_several_updates_on_one_rollout_leave_the_policy_it_was_sampled_from(tmp_path):
    fast = ["max_steps=1", "optimizer.learning_rate=1.0e-2"]
    (once,) = read_metrics(train(tmp_path / "1", *fast))
    (twice,) = read_metrics(train(tmp_path / "2", *fast, "updates_per_rollout=2"))
    assert once["kl"] == pytest.approx(0, abs=1e-9)
    assert twice["kl"] > 1e-6, "the second update is one step away from the reference"
    assert twice["ratio_max"] > 1 + 1e-3
    assert twice["sampler_gap"] < 1e-4, "measured before the first update"
    assert any(
        (weights(tmp_path / "1/run")[n] != weights(tmp_path / "2/run")[n]).any() for n in weights(tmp_path / "2/run")
    )


@pytest.mark.parametrize("freeze_vision", [True, False])
def test_a_frozen_tower_stays_bit_identical(tmp_path, freeze_vision):
    changed = changed_weights(train(tmp_path, f"freeze_vision={str(freeze_vision).lower()}", "max_steps=1"))
    assert {name.split(".")[0] for name in changed} == {"model"} | (set() if freeze_vision else {"visual"})


def test_the_reference_of_adapters_is_the_base(tmp_path):
    run = train(tmp_path, "lora={rank: 2}", "max_steps=2", "optimizer.learning_rate=1.0e-2")
    assert [row["kl"] > 1e-6 for row in read_metrics(run)] == [False, True]
    assert all("proj" in name for name in changed_weights(run))


def test_with_adapters_the_reference_is_the_base_model_bit_for_bit_and_its_program(tmp_path):
    settings = config(tmp_path, "lora={rank: 2}")
    policy, _, batch, _ = open_all(settings)
    ids = jnp.asarray(np.random.default_rng(0).integers(0, 500, (len(batch["tokens"]), 3, 8)), jnp.int32)
    adapters = jax.tree.map(lambda x: x + 0.1, policy.trainable)
    reference = reference_of(policy.graphdef, adapters, policy.frozen)
    base_graph, nothing, base = split_trainable(open_model(settings.model, data_mesh()), lora=True, freeze_vision=True)
    assert not jax.tree.leaves(nothing)

    inputs: Any = (batch, None, ids)
    ours = reference_logprobs(*reference, *inputs, temperature=1.0)
    np.testing.assert_array_equal(ours, reference_logprobs(base_graph, (base,), *inputs, temperature=1.0))
    adapted, _ = completion_logprobs(nnx.merge(policy.graphdef, adapters, policy.frozen), *inputs, temperature=1.0)
    assert np.abs(ours - adapted).max() > 1e-3

    held = zip(jax.tree.leaves(reference.states), jax.tree.leaves(policy.frozen), strict=True)
    assert all(one is other for one, other in held), "no copy of a weight, and no adapter"
    programs = [
        reference_logprobs.lower(graph, states, *inputs, temperature=1.0).as_text()
        for graph, states in (reference, (base_graph, (base,)))
    ]
    assert programs[0] == programs[1]


def test_without_a_kl_no_reference_is_held_or_computed(tmp_path, monkeypatch):
    monkeypatch.delattr(grpo, "reference_of")
    monkeypatch.delattr(grpo, "reference_logprobs")
    (row,) = read_metrics(train(tmp_path, "objective.kl_beta=0", "max_steps=1"))
    assert "kl" not in row
    assert row["grad_norm"] > 0


def test_gspo_clips_whole_completions_in_its_own_narrow_range(tmp_path):
    narrow = ["max_steps=1", "optimizer.learning_rate=1.0e-2", "updates_per_rollout=2", "objective.kind=gspo"]
    (row,) = read_metrics(train(tmp_path, *narrow))
    assert 0 < row["clip_fraction"] <= 0.5, "none at the first of the two updates"
    assert row["clip_fraction"] == row["clip_fraction_low"] + row["clip_fraction_high"]


class WaitingJudge(RuleJudge):
    """Answers once `released` is set."""

    def __init__(self) -> None:
        self.released = threading.Event()

    def submit(self, completions, records, image_root):
        judged, answer = super().submit(completions, records, image_root).result(), Future()

        def wait() -> None:
            if self.released.wait(300):
                answer.set_result(judged)
            else:
                answer.set_exception(TimeoutError("nothing happened while the judge worked"))

        threading.Thread(target=wait, daemon=True).start()
        return answer


def test_the_reference_is_computed_while_the_judge_works(tmp_path, monkeypatch):
    judge, original = WaitingJudge(), grpo.reference_logprobs

    def computed(*args, **settings):
        logprobs = original(*args, **settings)
        judge.released.set()
        return logprobs

    monkeypatch.setattr(grpo, "open_judge", lambda config: judge)
    monkeypatch.setattr(grpo, "reference_logprobs", computed)
    (row,) = read_metrics(train(tmp_path, "max_steps=1"))
    assert row["seconds/judge"] > 0


class StoppingJudge(RuleJudge):
    """Gives up at the second rollout; counts its calls and what it was told on resume."""

    def __init__(self, *, stops: bool) -> None:
        self.stops, self.calls, self.closed = stops, 0, False

    def submit(self, completions, records, image_root):
        self.calls += 1
        if not self.stops or self.calls == 1:
            return super().submit(completions, records, image_root)
        stopped = Future()
        stopped.set_exception(JudgeStoppedError("the judge gave up"))
        return stopped

    def state(self):
        return {"calls": self.calls}

    def set_state(self, state):
        self.calls = state["calls"]

    def close(self):
        self.closed = True


def test_a_judge_that_gives_up_stops_the_run_with_its_state_saved(tmp_path, monkeypatch, three_steps):
    run, judge, second = config(tmp_path, *EPOCHS), StoppingJudge(stops=True), StoppingJudge(stops=False)
    monkeypatch.setattr(grpo, "open_judge", lambda config: judge)
    for _ in range(2):  # the second time finds its step saved already
        judge.calls = min(judge.calls, 1)
        with pytest.raises(JudgeStoppedError, match="gave up"):
            grpo.train(run)
        assert judge.closed
        assert [row["step"] for row in read_metrics(run.run.directory)] == [0]
    checkpoints = Checkpoints(run.run.directory / "checkpoints", keep=3)
    assert checkpoints.latest() == 1
    checkpoints.close()

    monkeypatch.setattr(grpo, "open_judge", lambda config: second)
    resumed = grpo.train(run)
    assert second.calls == 4, "it counts on from what was saved at the first stop"
    assert measured(resumed) == measured(three_steps)
    assert_same_weights(resumed, three_steps)


def test_every_metric_stands_in_the_table_of_docs_grpo(three_steps):
    text = (ROOT / "docs" / "grpo.md").read_text()
    rows = re.findall(r"^\| (`[^|]+) \|", text[text.index("## What is logged") :], re.MULTILINE)
    documented = {name for row in rows for name in re.findall(r"`([^`]+)`", row)}
    logged = set(read_metrics(three_steps)[-1]) - {"step", "time"}
    assert not {name for name in logged if not any(fnmatch(name, pattern) for pattern in documented)}
    assert {pattern for pattern in documented if not any(fnmatch(name, pattern) for name in logged)} == {"judge/*"}


def test_the_progress_bonus_compares_with_the_raw_mean_of_the_visit_before(tmp_path, judged, visits):
    train(tmp_path, *EPOCHS)
    before: dict[int, float] = {}
    for scores, (ids, previous, feedback) in zip(judged, visits, strict=True):
        answers = feedback.scores.answer.reshape(feedback.judged.shape)
        raw = scores.reshape(answers.shape)
        assert sorted(ids) == [0, 1, 2, 3]
        for row, prompt in enumerate(ids.tolist()):
            bonus = raw[row] - before[prompt] if prompt in before else 0
            np.testing.assert_allclose(answers[row], raw[row] + bonus, atol=1e-6)
            assert np.isnan(previous[row]) == (prompt not in before)
            before[prompt] = float(np.float32(raw[row].mean()))


@pytest.mark.parametrize(
    ("cls", "method", "step", "logged"),
    [(MetricsLog, "log", 2, 2), (Checkpoints, "save", 3, 3), (MetricsLog, "log", 1, 1)],
)
def test_a_run_that_was_cut_resumes_bit_for_bit(tmp_path, monkeypatch, visits, three_steps, cls, method, step, logged):
    run = config(tmp_path, *EPOCHS)
    with monkeypatch.context() as patch:
        interrupt(patch, cls, method, step)
        with pytest.raises(KeyboardInterrupt):
            grpo.train(run)
    assert len(read_metrics(run.run.directory)) == logged
    visits.clear()
    resumed = measured(grpo.train(run))
    assert [row["step"] for row in resumed] == [0, 1, 2]
    assert resumed == measured(three_steps)
    assert_same_weights(run.run.directory, three_steps)
    assert np.isnan(visits[0][1]).all() == (step == 1), "the means of the visits before the checkpoint are restored"


TWO_DEVICES = """
import sys, pathlib, jax, numpy as np
jax.config.update("jax_default_matmul_precision", "highest")
from sif_jax.judge import completions as judging
from tests.test_grpo import opinion, train
judging.judge_completions = lambda *both: np.array([opinion(*pair) for pair in zip(*both)])
assert jax.device_count() == 2
train(pathlib.Path(sys.argv[1]), *sys.argv[2:])
"""


@pytest.mark.slow
def test_devices_and_micro_batches_share_an_update_that_does_not_depend_on_them(tmp_path):
    update = ["max_steps=1", "updates_per_rollout=2", "objective.kind=dapo", "optimizer.eps=1.0"]
    update += ["optimizer.learning_rate=1.0"]
    (one,) = measured(train(tmp_path / "one", *update))
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    arguments = [str(tmp_path / "two"), "micro_batch=2", *update]
    subprocess.run([sys.executable, "-c", TWO_DEVICES, *arguments], env=environment, check=True, cwd=ROOT)
    (two,) = measured(tmp_path / "two" / "run")
    assert one["clip_fraction"] > 0
    assert two.pop("sampler_gap") == pytest.approx(one.pop("sampler_gap"), abs=1e-6)
    assert two.pop("padding/row_steps") + one.pop("padding/row_steps") < 1, "lanes wait for each other"
    assert two == pytest.approx(one, rel=1e-4, abs=1e-6)
