"""The launcher: target files, clear errors before anything starts, and words that survive every shell and YAML between."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from launch.cli import PLANNERS, main
from launch.plan import show
from launch.script import join, quote, tied_to_input, worker_script
from launch.target import TARGETS, load_target
from sif_jax.errors import InputError
from tests.launch_targets import COMMAND, ROOT, SMALL, write_target

SHIPPED = sorted((ROOT / "launch" / "targets").glob("*.yaml"))
every_kind = pytest.mark.parametrize("kind", SMALL)
WORDS = [
    *COMMAND,
    "data.image_root=a b",
    "data.buckets.tokens=[16, 32]",
    "run.name=it's",
    'x="$HOME" `id` \\ $(id) $$ %d',
]
word = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=20)


def plan_of(path: Path, words=COMMAND):
    target = load_target(path)
    return PLANNERS[target.kind](target, words)


def error_of(capsys, *arguments: object) -> str:
    assert main([str(argument) for argument in arguments]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    return lines[0]


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_shipped_target_needs_at_most_two_edits_and_then_plans(path, tmp_path):
    text = path.read_text()
    values = yaml.safe_load(text)
    left = [key for key, value in values.items() if isinstance(value, str) and re.fullmatch(r"<.+>", value)]
    assert len(left) <= 2
    edited = tmp_path / path.name
    hosts = tmp_path / "hosts"
    hosts.write_text("gpu-a slots=8\n\n# spare\ngpu-b\n")
    edited.write_text(
        re.sub(r"(?m)^(\w+): <[^>]+>", lambda m: f"{m[1]}: {hosts if m[1] == 'hostfile' else 'mine'}", text)
    )
    assert plan_of(edited).processes
    if left:
        with pytest.raises(InputError, match=f"{path.name}: {left[0]} is still a placeholder.*expected.*fix"):
            load_target(path)


def test_every_kind_of_target_is_shipped_and_planned():
    shipped = {yaml.safe_load(path.read_text())["kind"] for path in SHIPPED}
    assert shipped == set(TARGETS) == set(PLANNERS) == set(SMALL)


@every_kind
def test_a_dry_run_is_the_same_every_time_and_starts_nothing(kind, tmp_path, capsys):
    path = write_target(tmp_path, kind, program=["/does/not/exist"])
    before = sorted(tmp_path.rglob("*"))
    outputs = []
    for _ in range(2):
        assert main([str(path), "--dry-run", *COMMAND]) == 0
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1] == show(plan_of(path))
    assert sorted(tmp_path.rglob("*")) == before


def test_the_dry_run_of_two_local_processes_reads_so(tmp_path, capsys):
    assert (
        main([str(write_target(tmp_path, "local")), "--dry-run", "sft", "configs/paper/sft.yaml", "data.path=a b"]) == 0
    )
    one, two = (
        f"""# --- starts process {index}
SIF_JAX_PREEMPTED_EXIT_CODE=75 \\
JAX_PLATFORMS=cpu \\
XLA_FLAGS=--xla_force_host_platform_device_count=4 \\
SIF_JAX_COORDINATOR=127.0.0.1:8476 \\
SIF_JAX_NUM_PROCESSES=2 \\
SIF_JAX_PROCESS_ID={index} \\
.venv/bin/sif-jax sft configs/paper/sft.yaml 'data.path=a b'
"""
        for index in range(2)
    )
    title = "# local: 2 processes of 4 CPU devices; restarts by the launcher: 0\n"
    assert capsys.readouterr().out == title + one + two


def test_the_script_runs_from_any_directory(tmp_path):
    command = [sys.executable, ROOT / "launch" / "run.py", write_target(tmp_path, "node"), "--dry-run", *COMMAND]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.endswith(f"-m gpu_compat.launcher {shlex.join(COMMAND)}\n")


def test_the_commands_own_dry_run_stays_with_the_command(tmp_path):
    plan = plan_of(write_target(tmp_path, "node"), [*COMMAND, "--dry-run"])
    assert plan.processes[0].argv[-1] == "--dry-run"


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"kind": "cloud"}, "wrong value of kind; got 'cloud'; expected 'local', 'node', 'ssh', 'slurm', 'gke'"),
        ({"nodez": 2}, "unknown key nodez; got 2; fix: did you mean nodes?"),
        ({"account": None}, "wrong value of account"),
        ({"partition": "<partition>"}, "partition is still a placeholder; got '<partition>'; expected partition; fix"),
        ({"partition": "a; rm -rf /"}, "wrong value of partition"),
        ({"name": "Two Words"}, "name: not a job name; got 'Two Words'; expected"),
        ({"env": {"A-B": "1"}}, "env: not an environment variable's name; got 'A-B'; expected"),
    ],
)
def test_a_wrong_target_is_one_clear_line(changes, says, tmp_path, capsys):
    path = tmp_path / "target.yaml"
    path.write_text(yaml.safe_dump({"kind": "slurm", **SMALL["slurm"], **changes}))
    error = error_of(capsys, path, *COMMAND)
    assert error.startswith(f"error: {path}: ")
    assert says in error


def test_a_missing_edit_is_one_clear_line(tmp_path, capsys):
    path = tmp_path / "target.yaml"
    path.write_text("kind: slurm\npartition: gpu\n")
    expected = f"error: {path}: account is missing; expected account that pays; fix: add the line account: …"
    assert error_of(capsys, path, *COMMAND) == expected


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "command line: no command to launch; expected one of ablate, bench, data, demo, eval"),
        (["sfft"], "command line: unknown command; got 'sfft'; expected one of ablate, bench, data, demo, eval"),
        (["data"], "command line: no command to launch; expected one of build, check"),
        (["sft", "nowhere.yaml"], "nowhere.yaml: cannot read this config"),
        (["sft", "a.yaml", "b.yaml"], "command line: more than one config"),
        (
            ["sft", "configs/paper/sft.yaml", "lora.rnk=4"],
            "command line: unknown key lora.rnk; got 4; fix: did you mean",
        ),
    ],
)
def test_a_command_that_every_host_would_refuse_starts_nothing(words, says, tmp_path, capsys):
    assert says in error_of(capsys, write_target(tmp_path, "node", program=["/does/not/exist"]), *words)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "no target; expected python launch/run.py TARGET.yaml"),
        (["--dryrun"], "unknown option; got '--dryrun'"),
        (["nowhere.yaml", "sft"], "nowhere.yaml: cannot read this config"),
    ],
)
def test_a_wrong_command_line_is_one_clear_line(arguments, says, capsys):
    assert says in error_of(capsys, *arguments)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"hosts": []}, "hosts: no host; expected one host or more; fix"),
        ({"hosts": ["a", "a"]}, "hosts: not a list of hosts; got 'a'; expected each host once"),
        ({"hosts": ["-oProxyCommand=id"]}, "not a list of hosts"),
        ({"hosts": ["a"], "hostfile": "h"}, "both hosts and hostfile are given"),
        ({"hosts": [], "hostfile": "/nowhere/hosts"}, "/nowhere/hosts: cannot read this hostfile"),
    ],
)
def test_a_wrong_list_of_hosts_is_one_clear_line(changes, says, tmp_path, capsys):
    assert says in error_of(capsys, write_target(tmp_path, "ssh", **changes), *COMMAND)


def test_a_program_that_is_not_here_is_one_clear_line(tmp_path, capsys):
    error = error_of(capsys, write_target(tmp_path, "node", program=["/does/not/exist"]), *COMMAND)
    assert error.startswith("error: not a program here; got '/does/not/exist'; expected a program on PATH; fix")


@settings(deadline=None)
@given(st.lists(word))
def test_any_words_come_back_from_the_shells_reading_of_a_line(words):
    assert shlex.split(join(words)) == words
    assert shlex.split(quote(join([quote(join(words))]))) == [join([quote(join(words))])]


def test_words_come_through_nested_shells_as_they_were(tmp_path):
    echo = [sys.executable, "-c", "import sys; print(sys.argv[1:])"]
    script = tied_to_input(worker_script([*echo, *WORDS], {"A": WORDS[-1]}, workdir=str(tmp_path)))
    for line in (script, f"bash -c {quote(script)}", f"bash -c {quote(f'bash -c {quote(script)}')}"):
        with subprocess.Popen(["bash", "-c", line], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as shell:
            assert shell.stdout is not None
            assert shell.stdout.read() == f"{WORDS}\n"
            assert shell.wait() == 0
