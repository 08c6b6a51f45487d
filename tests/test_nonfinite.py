"""NaN and infinity stop a run at the step where they appear, with its rows and a dump from which it can be replayed."""

import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from sif_jax.config import GrpoConfig, SftConfig
from sif_jax.errors import InputError
from sif_jax.judge import completions as judging
from sif_jax.training import grpo, sft
from sif_jax.training.checkpoint import Checkpoints
from sif_jax.training.metrics import read_metrics
from sif_jax.training.nonfinite import read_batch
from sif_jax.training.optimizer import make_optimizer
from sif_jax.training.policy_files import open_policy
from sif_jax.training.state import initial_state, make_apply
from tests.processes import opinion
from tests.tiny_run import tiny_config, tiny_files

# The first update makes weights that are finite and too large for anything to be computed with them.
EXPLODING = ["max_steps=4", "run.save_every=1", "run.log_every=4", "optimizer.learning_rate=1.0e+38"]


def assert_all_finite(tree) -> None:
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(tree))


def stopped(kind, train, root: Path) -> tuple[str, Path, dict]:
    """(what was told, the dump's directory, its report) of a run whose second step is not finite."""
    config = tiny_config(kind, root, *EXPLODING)
    with pytest.raises(InputError) as caught:
        train(config)
    dump = root / "run/nonfinite/step-1"
    return str(caught.value), dump, json.loads((dump / "report.json").read_text())


def test_a_step_of_sft_that_is_not_finite_is_told_with_its_rows_and_can_be_replayed(tmp_path):
    told, dump, report = stopped(SftConfig, sft.train, tmp_path)
    rows = report["rows"][0]
    assert told.startswith(f"{tiny_files()}/scenes/sft.json: step 1 is not finite (loss nan, grad_norm nan) with rows ")
    assert f"with rows {', '.join(map(str, rows))}; expected finite numbers; fix: see {dump}; " in told
    assert len(rows) == 4
    assert report["measured"] == {"loss": "nan", "grad_norm": "nan"}
    assert report["nonfinite"]["gradients"]
    assert not report["nonfinite"]["weights"], "the gradient was not applied"
    assert read_metrics(tmp_path / "run") == []

    config = tiny_config(SftConfig, tmp_path, *EXPLODING)
    policy = open_policy(config.model, lora=config.lora, freeze_vision=config.freeze_vision, seed=0)
    state = initial_state(policy.trainable, make_optimizer(config.optimizer, 4))
    with Checkpoints(tmp_path / "run/checkpoints", keep=3) as checkpoints:
        step, saved, host = checkpoints.restore(None, {"state": state})
    assert (step, host["config"]["run.name"]) == (1, "run")
    assert_all_finite(saved)
    key = jax.random.fold_in(jax.random.key(report["seed"]), report["step"])
    batch = jax.tree.map(jnp.asarray, read_batch(dump / "batch-0.npz"))
    gradients = sft.make_gradients(policy.graphdef, dropout=False)
    replayed, sums = gradients(None, saved["state"].trainable, policy.frozen, batch, key)
    assert math.isnan(float(sums.nll))
    bad = {"/".join(map(str, path)) for path, leaf in nnx.to_flat_state(replayed) if np.isnan(leaf[...]).any()}
    assert len(bad) == len(report["nonfinite"]["gradients"])


def test_a_step_of_grpo_that_is_not_finite_is_told_with_its_rows_and_what_was_sampled(tmp_path, monkeypatch):
    scores = lambda *both: np.array([opinion(*pair) for pair in zip(*both, strict=True)])  # noqa: E731
    monkeypatch.setattr(judging, "judge_completions", scores)
    told, dump, report = stopped(GrpoConfig, grpo.train, tmp_path)
    assert f"scenes/grpo.json: step 1 is not finite (loss nan, grad_norm nan) with rows {report['rows'][0][0]}" in told
    batch = read_batch(dump / "batch-0.npz")
    assert batch["rollout_ids"].shape == (4, 3, 8)
    assert batch["advantages"].shape == (4, 3)
    assert len(batch["tokens"]) == 4
    assert not report["nonfinite"]["weights"]
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == ["1"]


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e30], ids=["NaN", "infinity", "too large to square"])
def test_a_gradient_that_is_not_finite_changes_nothing(bad):
    optimizer = optax.adamw(1e-2)
    state = initial_state({"w": jnp.arange(3.0), "v": jnp.ones(2)}, optimizer)
    before = jax.tree.map(np.asarray, state)
    after, norm = make_apply(optimizer)(state, {"w": jnp.array([0, bad, 0]), "v": jnp.ones(2)}, jnp.float32(1))
    assert not math.isfinite(float(norm))
    assert jax.tree.all(jax.tree.map(lambda one, other: np.array_equal(one, other), after, before))


def test_weights_that_overflow_are_seen_though_the_gradient_is_finite():
    optimizer = optax.sgd(3e38)
    state = initial_state({"w": jnp.array([3e38])}, optimizer)
    after, norm = make_apply(optimizer)(state, {"w": jnp.array([-1.0])}, jnp.float32(1))
    assert np.isinf(after.trainable["w"]).all()
    assert math.isnan(float(norm))
