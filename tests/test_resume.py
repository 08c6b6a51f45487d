"""Exact resume: a run that is killed, or told to end, at any moment ends as one that never was, bit for bit."""

import random
import re
import signal
import time
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from sif_jax.config import GrpoConfig, SftConfig, config_text
from tests.resumable_run import start
from tests.tiny_run import assert_same_weights, measured, tiny_config, weights

beside_never_killed = pytest.mark.xdist_group("never killed")  # so that the fixture is made once

KINDS = {"sft": SftConfig, "grpo": GrpoConfig}
KILLS = 20


def written(stage: str, root: Path, *overrides: str) -> Path:
    """The config file of a run in `root / "run"`."""
    root.mkdir(parents=True, exist_ok=True)
    path = root / f"{stage}.yaml"
    path.write_text(config_text(tiny_config(KINDS[stage], root, *overrides)))
    return path


def ended(processes, timeout: float = 900) -> list[str]:
    outputs = [process.communicate(timeout=timeout)[0] for process in processes]
    assert all(process.returncode == 0 for process in processes), "\n".join(output[-4000:] for output in outputs)
    return outputs


def assert_same_run(one: Path, other: Path, *patterns: str) -> None:
    """Metrics, samples, weights and, as nothing half-written may lie about, the names of what matches the patterns."""
    assert [row["step"] for row in measured(one)] == list(range(len(measured(one))))
    assert measured(one) == measured(other)
    assert_same_weights(one, other)
    for pattern in ("samples/*", *patterns):
        assert {path.name for path in one.glob(pattern)} == {path.name for path in other.glob(pattern)}
    for file in one.glob("samples/*"):
        assert file.read_bytes() == (other / "samples" / file.name).read_bytes()


def wait_for_ready(process) -> bool:
    """Whether the process came as far as its loop."""
    return any(line == "ready\n" for line in process.stdout)


def wait_for_lines(file: Path, more: int, process) -> None:
    def count() -> int:
        return file.read_text().count("\n") if file.exists() else 0

    before = count()
    while count() < before + more and process.poll() is None:
        time.sleep(0.002)


def kill_at_random(config: Path, rng: random.Random, most_steps: int) -> float:
    """Start the run and kill it: while it starts, or some steps and milliseconds later. Returns the seconds it lived."""
    (process,) = start(config)
    began, started = time.monotonic(), rng.random() < 0.8
    if started and wait_for_ready(process):
        wait_for_lines(config.parent / "run/metrics.jsonl", rng.randint(0, most_steps), process)
        time.sleep(rng.uniform(0, 0.2))
    elif not started:
        time.sleep(rng.uniform(0, 5))
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL, "the run ended before it was killed"
    return time.monotonic() - began


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "most_steps", "options"),
    [
        ("sft", 12, ["max_steps=150", "run.save_every=3", "lora={rank: 2, dropout: 0.1}"]),
        ("grpo", 5, ["max_steps=60", "run.save_every=2", "run.samples_every=1", "max_new_tokens=40"]),
    ],
)
def test_twenty_kills_at_random_moments_change_nothing(tmp_path, stage, most_steps, options):
    ended(start(written(stage, tmp_path / "never", *options)))
    config, rng = written(stage, tmp_path / "killed", *options), random.Random(stage)
    lives = [kill_at_random(config, rng, most_steps) for _ in range(KILLS)]
    print(f"{stage}: {KILLS} kills after {', '.join(f'{life:.2f}' for life in lives)} s")
    ended(start(config))
    assert_same_run(tmp_path / "killed/run", tmp_path / "never/run", "*", "checkpoints/*")


KILL_POINTS = [
    pytest.param("sft", "save:2:SIGKILL", id="sft, while its second checkpoint is written"),
    pytest.param("grpo", "rollout:3:SIGKILL", id="grpo, in a rollout", marks=pytest.mark.slow),
]


@pytest.fixture(scope="module")
def never_killed(tmp_path_factory):
    """The run of a stage that nothing happened to."""
    root = tmp_path_factory.mktemp("never")

    @cache
    def run(stage: str) -> Path:
        ended(start(written(stage, root / stage, *FOUR_STEPS[stage])))
        return root / stage / "run"

    return run


FOUR_STEPS = {
    "sft": ["max_steps=4", "run.save_every=2"],
    "grpo": ["max_steps=4", "run.save_every=2", "run.samples_every=1", "data.limit=4", "max_new_tokens=40"],
}


@beside_never_killed
@pytest.mark.parametrize(("stage", "hook"), KILL_POINTS)
def test_a_kill_in_the_middle_changes_nothing(tmp_path, never_killed, stage, hook):
    config = written(stage, tmp_path / stage, *FOUR_STEPS[stage])
    (process,) = start(config, hook=hook)
    output = process.communicate(timeout=900)[0]
    assert process.returncode == -signal.SIGKILL, output[-4000:]
    assert not (tmp_path / stage / "run/model").exists()
    ended(start(config))
    assert_same_run(tmp_path / stage / "run", never_killed(stage), "checkpoints/*")


@beside_never_killed
@pytest.mark.parametrize(
    ("stage", "hook", "step"),
    [
        pytest.param("sft", "log:2:SIGTERM", 2, id="sft, in its second step, which is finished"),
        pytest.param(
            "grpo", "rollout:4:SIGTERM", 1, id="grpo, in its second rollout, which is given up", marks=pytest.mark.slow
        ),
    ],
)
def test_a_sigterm_saves_and_ends_with_zero_and_the_same_command_resumes(tmp_path, never_killed, stage, hook, step):
    config, run = written(stage, tmp_path / stage, *FOUR_STEPS[stage]), tmp_path / stage / "run"
    (output,) = ended(start(config, hook=hook))
    assert output.splitlines()[-1] == (
        f"preempted (SIGTERM): {run} is saved before step {step}; run the same command to resume"
    )
    assert [path.name for path in (run / "checkpoints").iterdir()] == [str(step)]
    assert not (run / "model").exists()
    ended(start(config))
    assert_same_run(run, never_killed(stage))


# SGD-like: with a large eps Adam's update is proportional to the gradient, so that errors are not blown up.
SGD = ["optimizer.eps=1.0", "optimizer.learning_rate=1.0", "run.save_every=1000"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "hook", "options"),
    [
        ("sft", "log:3:SIGTERM", ["max_steps=150", "mesh.fsdp=2", "optimizer.learning_rate=0.1"]),
        ("grpo", "rollout:3:SIGTERM", ["max_steps=30", "data.limit=4"]),
    ],
)
def test_processes_agree_where_they_stop_and_another_number_of_them_goes_on(tmp_path, stage, hook, options):
    """The signal goes to one of two; on one device the run then continues as it would have."""
    config, run = written(stage, tmp_path / "two", *SGD, *options), tmp_path / "two/run"
    outputs = ended(start(config, hook=hook, count=2))
    steps = [re.findall(r"is saved before step (\d+); run the same command to resume", output) for output in outputs]
    assert steps[0] == steps[1]
    assert [path.name for path in (run / "checkpoints").iterdir()] == steps[0]
    assert 0 < int(steps[0][0]) < 30
    assert not (run / "model").exists()

    alone = [*SGD, *options, "mesh.fsdp=1"]
    ended(start(written(stage, tmp_path / "two", *alone)))
    ended(start(written(stage, tmp_path / "one", *alone)))
    for ours, theirs in zip(measured(run), measured(tmp_path / "one/run"), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-4)
    expected = weights(tmp_path / "one/run")
    for name, value in weights(run).items():
        np.testing.assert_allclose(value, expected[name], atol=1e-4, err_msg=name)


@pytest.mark.slow
def test_processes_stop_with_the_same_line_at_a_step_that_is_not_finite(tmp_path):
    config = written("sft", tmp_path, "max_steps=9", "optimizer.learning_rate=1.0e+38", "run.save_every=1")
    processes = start(config, count=2)
    outputs = [process.communicate(timeout=900)[0] for process in processes]
    errors = [re.findall(r"^error: .*$", output, re.MULTILINE) for output in outputs]
    assert [process.returncode for process in processes] == [2, 2], outputs
    assert errors[0] == errors[1]
    assert "step 1 is not finite (loss nan, grad_norm nan) with rows " in errors[0][0]
    names = {path.name for path in (tmp_path / "run/nonfinite/step-1").iterdir()}
    assert names == {"report.json", "batch-0-process-0.npz", "batch-0-process-1.npz"}
