"""Several processes are one job: the same order, judgements, metrics and weights as one process; refusals reach every host."""

import itertools
import json
import re
import time

import numpy as np
import pytest

from sif_jax.errors import InputError
from sif_jax.parallel.distributed import heartbeat_timeout_s, own_run, read_environment
from sif_jax.parallel.job import Failure, Silence
from sif_jax.training.accounts import share_of_account
from tests.judge_server import says, serve
from tests.processes import ends, finish, start
from tests.tiny_run import measured, records_of, tiny_files, weights, write_rows, write_tiny_model

TEXT = "the second half of the job's rows shows no image"
# SGD-like: with a large eps Adam's update is proportional to the gradient, so that errors are not blown up.
SGD = ["optimizer.eps=1.0", "optimizer.learning_rate=1.0"]
JOB = {"SIF_JAX_COORDINATOR": "host:1", "SIF_JAX_NUM_PROCESSES": "2", "SIF_JAX_PROCESS_ID": "1"}


def inputs(stage: str) -> list[str]:
    split = "test" if stage == "eval" else stage
    return [f"model.path={tiny_files() / 'model'}", f"data.path={tiny_files() / 'scenes' / split}.json"]


def rows(output: str) -> list[list[int]]:
    """The records of each batch that a process loaded."""
    found = re.findall(r"^rows (\(.*\)) patches", output, re.MULTILINE)
    return [[int(number) for number in re.findall(r"\d+", records)] for records in found]


def assert_same_run(one, many):
    for ours, theirs in zip(measured(many), measured(one), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-5)
    expected = weights(one)
    for name, value in weights(many).items():
        np.testing.assert_allclose(value, expected[name], atol=1e-5, err_msg=name)


@pytest.mark.parametrize(
    ("stage", "count", "options"),
    [
        pytest.param("sft", 2, ["max_steps=2", "lora={rank: 2}", TEXT], id="sft, 2, one without images"),
        pytest.param("sft", 2, ["max_steps=2", "lora={rank: 2}"], id="sft, 2", marks=pytest.mark.slow),
        pytest.param("sft", 4, ["max_steps=3", "accumulation=2"], id="sft, 4", marks=pytest.mark.slow),
        pytest.param("grpo", 2, ["max_steps=3", "data.limit=4"], id="grpo, 2", marks=pytest.mark.slow),
        pytest.param(
            "grpo", 2, ["max_steps=3", "data.limit=4", TEXT], id="grpo, 2, one without images", marks=pytest.mark.slow
        ),
        pytest.param("grpo", 4, ["max_steps=3", "data.limit=4"], id="grpo, 4", marks=pytest.mark.slow),
    ],
)
def test_processes_train_what_one_does(tmp_path, stage, count, options):
    settings = [*inputs(stage), *SGD, *(option for option in options if option != TEXT)]
    text_only = {"TEXT_ONLY": "1"} if TEXT in options else {}
    outputs = finish(start(stage, tmp_path / "many", count, *settings, **text_only))
    (alone,) = finish(start(stage, tmp_path / "one", 1, *settings, devices=count, **text_only))
    assert_same_run(tmp_path / "one/run", tmp_path / "many/run")
    steps = 3 * 2 if "accumulation=2" in options else int(options[0].partition("=")[2])
    shares = [rows(output)[:steps] for output in outputs]
    assert [list(itertools.chain(*parts)) for parts in zip(*shares, strict=True)] == rows(alone)[:steps]
    assert all(output.count("attention:") == (index == 0) for index, output in enumerate(outputs))
    shown = [set(re.findall(r"patches (\d)", output)) for output in outputs]
    assert shown == ([{"1"}, {"0"}] if text_only else [{"1"}] * count)
    if stage == "grpo":
        assert all(re.findall(r"judged (\d+)", output) == [str(12 // count)] * 3 for output in outputs)


@pytest.mark.parametrize(
    ("stage", "overrides", "told"),
    [
        pytest.param(
            "sft",
            ["run.seed={process}"],
            "started with different run.seed; got '1 in process 1'; expected 0, as in process 0",
            id="different configs",
        ),
        pytest.param(
            "sft", ["mesh.tensor=3"], "the mesh does not divide the devices", id="devices", marks=pytest.mark.slow
        ),
        pytest.param(
            "eval", ["run.root=/proc/none"], "cannot write the results", id="nowhere to write", marks=pytest.mark.slow
        ),
        pytest.param("sft", ["run.root=/proc/none"], "cannot create the run", id="no run", marks=pytest.mark.slow),
        pytest.param(
            "eval", ["mesh.tensor=2"], "mesh.tensor does not divide the 1 num_key", id="heads", marks=pytest.mark.slow
        ),
        pytest.param(
            "grpo", ["num_samples=3", "micro_batch=1"], "neither prompts nor samples divide", marks=pytest.mark.slow
        ),
        pytest.param("eval", ["batch_size=3"], "rows do not divide over the devices", marks=pytest.mark.slow),
        pytest.param("eval", ["max_new_tokens=1{process}"], "different max_new_tokens", marks=pytest.mark.slow),
    ],
)
def test_what_is_refused_is_one_line_on_every_process(tmp_path, stage, overrides, told):
    codes, outputs = ends(start(stage, tmp_path, 2, *inputs(stage), *overrides))
    assert codes == [2, 2], outputs
    for output in outputs:
        (line,) = re.findall(r"^error: .*$", output, re.MULTILINE)
        assert told in line
        assert "Traceback" not in output
    assert [path.name for path in tmp_path.rglob("*")] in ([], ["run"])


@pytest.mark.slow
def test_a_checkpoint_of_another_model_is_refused_by_every_process(tmp_path):
    def train(*options: str):
        return start("sft", tmp_path, 2, *inputs("sft"), "max_steps=1", "lora={rank: 2}", *options)

    finish(train())
    config = tmp_path / "run/config.yaml"
    config.write_text(config.read_text().replace("rank: 2", "rank: 3"))
    codes, outputs = ends(train("lora={rank: 3}"))
    assert codes == [2, 2], outputs
    assert all(re.search(r"^error: .*the tensor state\.\S+ differs; got", output, re.MULTILINE) for output in outputs)


@pytest.mark.slow
def test_where_process_0_is_killed_jax_ends_the_others_at_once(tmp_path):
    codes, outputs = ends(start("sft", tmp_path, 2, *inputs("sft"), "max_steps=40", FAULT="kill@0"))
    (struck,) = re.findall(r"^struck ([\d.]+)", outputs[0], re.MULTILINE)
    assert time.time() - float(struck) < 60
    assert (codes[0], codes[1] != 0) == (-9, True)
    assert re.search("leader task was preempted/died|error: process 0 failed: it ended without a word", outputs[1])


def test_a_coordinator_that_never_answers_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("SIF_JAX_INIT_TIMEOUT_S", "3")
    first, second = start("sft", tmp_path, 2, *inputs("sft"))
    first.kill()
    first.communicate()
    output = second.communicate(timeout=60)[0]
    assert second.returncode == 2
    assert re.search(
        r"^error: not every process met at 127.0.0.1:\d+ within 3 s; fix: check SIF_JAX_COORDINATOR", output
    )


@pytest.mark.parametrize(
    ("count", "options", "devices"),
    [
        pytest.param(2, ["data.limit=5", "batch_size=4"], 1, id="2 processes, 5 questions in batches of 4"),
        pytest.param(2, ["mesh.tensor=2", "batch_size=2"], 2, id="2 processes of 2 devices", marks=pytest.mark.slow),
        pytest.param(4, ["mesh.fsdp=4", "data.limit=3"], 1, id="4 processes, 3 questions", marks=pytest.mark.slow),
        pytest.param(2, ["data.on_error=skip", "batch_size=6"], 1, id="skipped rows", marks=pytest.mark.slow),
    ],
)
def test_processes_evaluate_as_one_does(tmp_path, count, options, devices):
    rows = records_of("test")
    if "data.on_error=skip" in options:
        rows[1]["image"] = "none.png"
    data = [
        f"model.path={write_tiny_model(tmp_path / 'model', 'tiny_model.num_key_value_heads=2')}",
        f"data.path={write_rows(tmp_path / 'rows.json', rows)}",
        f"data.image_root={tiny_files() / 'scenes'}",
    ]
    many = start("eval", tmp_path / "many", count, *data, *options, devices=devices)
    alone = start("eval", tmp_path / "one", 1, *data, *(each for each in options if "mesh" not in each))
    finish(many)
    finish(alone)
    for name in ("samples.jsonl", "summary.json"):
        assert (tmp_path / "many/run" / name).read_text() == (tmp_path / "one/run" / name).read_text()


FAULTS = {
    "image@1": "broken.png: not an image",
    "image@0": "broken.png: not an image",
    "bug@1": "KeyError: 'a bug'",
    "kill@1": "",
    "freeze@1": "",
    "disk@0": "cannot write a checkpoint (File too large); the earlier ones are intact",
    "disk@1": "cannot write a checkpoint (File too large); the earlier ones are intact",
}
FAST = ["image@1"]


@pytest.mark.parametrize(
    "fault", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in FAULTS]
)
def test_where_one_process_fails_in_the_middle_of_a_run_all_end_with_its_reason(tmp_path, fault):
    options = [*inputs("sft"), "max_steps=6", "lora={rank: 2}", "run.save_every=2"]
    index, told = int(fault[-1]), FAULTS[fault]
    processes = start("sft", tmp_path, 2, *options, FAULT=fault, SIF_JAX_HEARTBEAT_TIMEOUT_S="10")
    codes, outputs = ends(processes, frozen=1 if fault == "freeze@1" else None)
    ended, failed, other = time.time(), outputs[index], outputs[1 - index]
    (struck,) = re.findall(r"^struck ([\d.]+)", failed, re.MULTILINE)
    assert ended - float(struck) < 60, "a few seconds, where nothing else runs"
    assert codes[1 - index] == (2 if fault.startswith(("image", "disk")) else 1)
    assert codes[index] == (-9 if fault in ("kill@1", "freeze@1") else codes[1 - index])
    assert told in failed
    (line,) = re.findall(r"^error: .*$", other, re.MULTILINE)
    if fault.startswith("disk"):  # what concerns a checkpoint is told by all alike
        assert line in failed
    else:
        assert line.startswith(f"error: process {index} failed: {told or 'it ended without a word'}")
    assert "Traceback" not in other
    if fault in FAST:
        return
    finish(start("sft", tmp_path, 1, *options, devices=2))
    assert [row["step"] for row in measured(tmp_path / "run")] == list(range(6))


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"SIF_JAX_PROCESS_ID": ""}, "SIF_JAX_PROCESS_ID is not set"),
        ({"SIF_JAX_PROCESS_ID": "2"}, "wrong value of SIF_JAX_PROCESS_ID; got 2; expected 0 to 1"),
        ({"SIF_JAX_NUM_PROCESSES": "two"}, "wrong value of SIF_JAX_NUM_PROCESSES"),
        ({"SIF_JAX_COORDINATOR": "host"}, "expected host:port"),
        ({"SIF_JAX_DISTRIBUTED": "yes"}, "wrong value of SIF_JAX_DISTRIBUTED; got 'yes'; expected auto, or unset"),
    ],
)
def test_half_an_environment_is_refused(changes, told):
    with pytest.raises(InputError, match=told):
        read_environment(JOB | changes)


def test_a_process_is_silent_when_it_has_said_nothing_new_for_too_long():
    silence = Silence(2, 10, now=0.0)
    assert silence.failure({0: "1"}, now=9.0) is None
    assert silence.failure({0: "2", 1: "1"}, now=10.0) is None
    assert silence.failure({0: "3", 1: "1"}, now=20.0) is None
    process, reason, code = silence.failure({0: "4", 1: "1"}, now=21.0)
    assert (process, code) == (1, 1)
    assert "silent for 10 s" in reason


def test_a_failure_is_one_line_that_names_its_process():
    failure = Failure(1, "a.png: not\nan image", 2)
    assert failure.on(1) == "a.png: not an image"
    assert failure.on(0) == "process 1 failed: a.png: not an image"


def test_the_environment_says_how_long_a_process_may_be_silent():
    assert heartbeat_timeout_s({}) == 100
    assert heartbeat_timeout_s({"SIF_JAX_HEARTBEAT_TIMEOUT_S": "20"}) == 20
    with pytest.raises(InputError, match="wrong value of SIF_JAX_HEARTBEAT_TIMEOUT_S; got 'soon'; expected a whole"):
        heartbeat_timeout_s({"SIF_JAX_HEARTBEAT_TIMEOUT_S": "soon"})


def test_the_environment_says_what_to_join():
    assert read_environment({}) is None
    assert read_environment({"SIF_JAX_DISTRIBUTED": "auto"}) == {}
    assert read_environment(JOB) == {"coordinator_address": "host:1", "num_processes": 2, "process_id": 1}


def test_one_process_judges_every_completion():
    assert own_run(12) == slice(0, 12)


@pytest.mark.slow
def test_what_the_processes_ask_of_a_judge_adds_up(tmp_path):
    options = ["max_steps=2", "judge.kind=openai", "judge.model=m", "judge.api_key_env=null"]
    with serve(says('{"score": 0.5}')) as server:
        finish(
            start("grpo", tmp_path, 2, *inputs("grpo"), *options, f"judge.base_url={server.url}", ANY_ANSWER="1"),
        )
        calls = len(server.requests)
    last = measured(tmp_path / "run")[-1]
    assert calls > 12
    assert (last["judge/calls"], last["judge/prompt_tokens"]) == (calls, 100 * calls)
    account = json.loads((tmp_path / "run/checkpoints/2/host/metadata").read_text())["host"]["judge"]
    assert (account["calls"], account["prompt_tokens"]) == (calls, 100 * calls)


def test_the_shares_of_an_account_add_up(monkeypatch):
    account = {"calls": 7, "cost": 1.5, "failures": {"timeout": 2}}
    assert share_of_account(json.loads(json.dumps(account))) == account
    monkeypatch.setattr("jax.process_count", lambda: 3)
    shares = []
    for index in range(3):
        monkeypatch.setattr("jax.process_index", lambda index=index: index)
        shares.append(share_of_account(account))
    assert [share["calls"] for share in shares] == [3, 2, 2]
    assert sum(share["failures"]["timeout"] for share in shares) == 2
    assert sum(share["cost"] for share in shares) == pytest.approx(1.5)
