"""Supervised fine-tuning as a whole: it learns, it accumulates, it trains what it should, and it resumes bit for bit."""

import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from sif_jax.config import SftConfig
from sif_jax.models.qwen2_5_vl.layer_arrays import take_apart
from sif_jax.training import policy_files, sft
from sif_jax.training.checkpoint import Checkpoints
from sif_jax.training.metrics import MetricsLog, read_metrics
from tests.conftest import ROOT
from tests.tiny_run import assert_same_weights, changed_weights, measured, tiny_config, tiny_files, weights


def config(root, *overrides: str) -> SftConfig:
    return tiny_config(SftConfig, root, *overrides)


def train(root, *overrides: str):
    return sft.train(config(root, *overrides))


@pytest.fixture(scope="module")
def six_steps(tmp_path_factory):
    return train(tmp_path_factory.mktemp("six"), "max_steps=6", "run.save_every=3")


def test_the_loss_falls_on_a_few_records(tmp_path):
    run = train(tmp_path, "data.limit=8", "batch_size=8", "max_steps=15", "optimizer.learning_rate=1.0e-2")
    losses = [row["loss"] for row in read_metrics(run)]
    assert losses[0] == pytest.approx(np.log(512), abs=0.2), "a random model knows nothing"
    assert losses[-1] < 0.7 * losses[0]


def test_two_half_batches_make_the_same_update_as_one_whole(tmp_path):
    # SGD-like: with a large eps Adam's update is proportional to the gradient, so that errors are not blown up.
    update = ["max_steps=1", "optimizer.eps=1.0", "optimizer.learning_rate=1.0"]
    whole = train(tmp_path / "whole", "batch_size=8", *update)
    halves = train(tmp_path / "halves", "batch_size=4", "accumulation=2", *update)
    one, other = read_metrics(whole)[0], read_metrics(halves)[0]
    assert one["target_tokens"] == other["target_tokens"]
    for key in ("loss", "grad_norm"):
        assert one[key] == pytest.approx(other[key], rel=1e-5)
    expected = weights(whole)
    assert len(changed_weights(whole)) > 10
    for name, value in weights(halves).items():
        np.testing.assert_allclose(value, expected[name], atol=1e-5, err_msg=name)


def test_without_lora_a_frozen_tower_stays_bit_identical_and_the_rest_learns(tmp_path):
    changed = changed_weights(train(tmp_path, "freeze_vision=true", "max_steps=2"))
    assert {name.split(".")[0] for name in changed} == {"model"}
    assert "model.embed_tokens.weight" in changed


def test_every_part_learns_in_a_full_fine_tune(six_steps):
    assert {name.split(".")[0] for name in changed_weights(six_steps)} == {"model", "visual"}


@pytest.mark.parametrize("freeze_vision", [True, False])
def test_lora_trains_the_adapters_alone(tmp_path, freeze_vision):
    run = train(tmp_path, "lora={rank: 2, dropout: 0.1}", f"freeze_vision={str(freeze_vision).lower()}", "max_steps=2")
    changed = changed_weights(run)
    assert all(name.endswith(("proj.weight", "qkv.weight", "mlp.0.weight", "mlp.2.weight")) for name in changed)
    assert {name.split(".")[0] for name in changed} == {"model"} | (set() if freeze_vision else {"visual"})
    with_adapters = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert {name.split(".")[-2] for name in changed if name.startswith("model.")} == with_adapters


@pytest.mark.slow
def test_layers_that_are_arrays_of_their_own_train_the_same_model(tmp_path, monkeypatch):
    short, taken = ["lora={rank: 2, dropout: 0.1}", "max_steps=2", "model.remat=dots"], []
    monkeypatch.setattr(policy_files, "take_apart", lambda frozen: taken.append(frozen) or take_apart(frozen))
    stacked = train(tmp_path / "stacked", *short)
    assert not taken
    apart = train(tmp_path / "apart", *short, "model.scan_layers=false")
    assert len(taken) == 1
    assert [row["loss"] for row in read_metrics(stacked)] == [row["loss"] for row in read_metrics(apart)]
    assert_same_weights(stacked, apart)


def test_packed_rows_train_as_many_tokens_in_fewer_rows(tmp_path):
    run = train(tmp_path, "packing=true", "data.buckets.tokens=[320]", "data.buckets.patches=[144]", "max_steps=2")
    packed = read_metrics(run)
    assert len(packed) == 2
    assert packed[0]["target_tokens"] > 500, "four rows of two examples each"
    assert np.isfinite([row["loss"] for row in packed]).all()


def interrupt(monkeypatch, cls: type, method: str, at_step: int) -> None:
    """The process dies when `method` is called for this step."""
    original = getattr(cls, method)

    def dies(self, step, *args, **kwargs):
        if step == at_step:
            raise KeyboardInterrupt
        return original(self, step, *args, **kwargs)

    monkeypatch.setattr(cls, method, dies)


@pytest.mark.parametrize(
    ("cls", "method", "step", "logged"),
    [(MetricsLog, "log", 4, 4), (Checkpoints, "save", 6, 6), (MetricsLog, "log", 1, 1)],
)
def test_a_run_that_was_cut_resumes_bit_for_bit(tmp_path, monkeypatch, six_steps, cls, method, step, logged):
    run = config(tmp_path, "max_steps=6", "run.save_every=3")
    with monkeypatch.context() as patch:
        interrupt(patch, cls, method, step)
        with pytest.raises(KeyboardInterrupt):
            sft.train(run)
    assert len(read_metrics(run.run.directory)) == logged
    assert not (run.run.directory / "model").exists()
    resumed = measured(sft.train(run))
    assert [row["step"] for row in resumed] == list(range(6))
    assert resumed == measured(six_steps)
    assert_same_weights(run.run.directory, six_steps)


def test_a_finished_run_is_left_as_it_is(tmp_path, six_steps):
    before = (six_steps / "metrics.jsonl").read_text()
    train(six_steps.parent, "max_steps=6", "run.save_every=3")
    assert (six_steps / "metrics.jsonl").read_text() == before


KILLED = """
import sys
import tests.conftest
from pathlib import Path
from tests.test_sft import config
from sif_jax.training import sft
sft.train(config(Path(sys.argv[1]), "max_steps=6", "run.save_every=3", *sys.argv[2:]))
"""


@pytest.mark.slow
def test_a_killed_process_resumes_bit_for_bit(tmp_path, six_steps):
    same = [f"model.path={tiny_files()}/model", f"data.path={tiny_files()}/scenes/sft.json"]
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path), *same], cwd=ROOT)
    deadline = time.monotonic() + 120
    while not (tmp_path / "run/checkpoints/3").exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    run = train(tmp_path, "max_steps=6", "run.save_every=3")
    assert [row["step"] for row in read_metrics(run)] == list(range(6))
    assert_same_weights(run, six_steps)


def test_accumulation_runs_one_program_and_the_padding_is_reported(tmp_path, monkeypatch):
    made = []

    def remembered(*args, **kwargs):
        made.append(make_gradients(*args, **kwargs))
        return made[-1]

    make_gradients = sft.make_gradients
    monkeypatch.setattr(sft, "make_gradients", remembered)
    run = train(tmp_path, "batch_size=2", "accumulation=3", "max_steps=2")
    assert made[0]._cache_size() == 1
    row = read_metrics(run)[-1]
    assert 0 < row["padding/tokens"] < 1
    assert 0 <= row["padding/patches"] < 1
