"""Exact resume: a run that is killed, or told to end, at any moment ends as one that never was, bit for bit."""

import random
import signal
import time
from pathlib import Path

import pytest

from sif_jax.config import GrpoConfig, SftConfig, config_text
from tests.resumable_run import start
from tests.tiny_run import assert_same_weights, measured, tiny_config

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


def assert_same_run(one: Path, other: Path) -> None:
    """Metrics, samples, weights and checkpoints' names; nothing half-written lies about."""
    assert [row["step"] for row in measured(one)] == list(range(len(measured(one))))
    assert measured(one) == measured(other)
    assert_same_weights(one, other)
    for pattern in ("samples/*", "checkpoints/*"):
        files, others = ({path.name: path for path in run.glob(pattern)} for run in (one, other))
        assert files.keys() == others.keys()
        assert all(path.is_dir() or path.read_bytes() == others[name].read_bytes() for name, path in files.items())


def wait_for_ready(process) -> bool:
    """Whether the process came as far as its loop."""
    return any(line == "ready\n" for line in process.stdout)


def wait_for_lines(file: Path, more: int, process) -> None:
    before = file.read_text().count("\n")
    while file.read_text().count("\n") < before + more and process.poll() is None:
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
    assert_same_run(tmp_path / "killed/run", tmp_path / "never/run")


KILL_POINTS = [
    pytest.param("sft", "save:2:SIGKILL", id="sft, while its second checkpoint is written"),
    pytest.param("grpo", "rollout:3:SIGKILL", id="grpo, in a rollout"),
]


@pytest.fixture(scope="module")
def never_killed(tmp_path_factory):
    """The runs that nothing happened to, by stage."""
    root = tmp_path_factory.mktemp("never")
    configs = [written(stage, root / stage, *FOUR_STEPS[stage]) for stage in KINDS]
    ended([process for config in configs for process in start(config)])
    return {config.stem: config.parent / "run" for config in configs}


FOUR_STEPS = {
    "sft": ["max_steps=4", "run.save_every=2"],
    "grpo": ["max_steps=4", "run.save_every=2", "run.samples_every=1", "data.limit=4", "max_new_tokens=40"],
}


@pytest.mark.parametrize(("stage", "hook"), KILL_POINTS)
def test_a_kill_in_the_middle_changes_nothing(tmp_path, never_killed, stage, hook):
    config = written(stage, tmp_path / stage, *FOUR_STEPS[stage])
    (process,) = start(config, hook=hook)
    output = process.communicate(timeout=900)[0]
    assert process.returncode == -signal.SIGKILL, output[-4000:]
    assert not (tmp_path / stage / "run/model").exists()
    ended(start(config))
    assert_same_run(tmp_path / stage / "run", never_killed[stage])


@pytest.mark.parametrize(
    ("stage", "hook", "step"),
    [
        pytest.param("sft", "log:2:SIGTERM", 2, id="sft, in its second step, which is finished"),
        pytest.param("grpo", "rollout:4:SIGTERM", 1, id="grpo, in its second rollout, which is given up"),
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
    assert_same_run(run, never_killed[stage])
