"""Really starting things: several processes here, and hosts behind a stand-in for ssh that behaves as ssh does."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.launch_targets import COMMAND, ROOT, fake_command, fake_path, probe, probed, write_target

DOWN_S = 3  # long enough that the other host has started
# Like ssh: what it started lives on when the connection is cut, and only its input ends.
SSH = f"""#!{sys.executable}
import os, subprocess, sys, time
*_, host, command = sys.argv
if host.endswith("down"):
    time.sleep({DOWN_S})
    sys.exit(255)
far = subprocess.Popen(["bash", "-c", command], stdin=subprocess.PIPE, start_new_session=True)
os.set_blocking(0, False)
while far.poll() is None:
    try:
        if os.read(0, 1) == b"":
            far.stdin.close()
            far.wait()
    except BlockingIOError:
        time.sleep(0.05)
sys.exit(far.returncode)
"""


def launch(target: Path, *words: str, env=None, timeout=60) -> subprocess.CompletedProcess:
    command = [sys.executable, ROOT / "launch" / "run.py", target, *(words or COMMAND)]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=timeout)


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z" if Path("/proc").is_dir() else True


def wait_for(condition, seconds=20) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)
    return condition()


# Two processes of two devices meet through the three variables alone, and sum over all four devices.
JOIN = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec
jax.distributed.initialize(
    os.environ["SIF_JAX_COORDINATOR"], int(os.environ["SIF_JAX_NUM_PROCESSES"]), int(os.environ["SIF_JAX_PROCESS_ID"])
)
mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))
rows = NamedSharding(mesh, PartitionSpec("data"))
own = np.arange(2, dtype=np.float32) + 2 * jax.process_index()
array = jax.make_array_from_process_local_data(rows, own)
total = jax.jit(jnp.sum, out_shardings=NamedSharding(mesh, PartitionSpec()))(array)
print("SUM", jax.process_index(), jax.process_count(), jax.device_count(), float(total), flush=True)
"""


def test_local_processes_find_each_other_and_compute_together(tmp_path):
    target = write_target(
        tmp_path, "local", program=probe(tmp_path, JOIN), devices_per_process=2, port=free_port(), env={"MY": "a b"}
    )
    done = launch(target, *COMMAND, "data.image_root=a [b] c")
    assert done.returncode == 0, done.stdout + done.stderr
    assert sorted(line.partition("SUM ")[2] for line in done.stdout.splitlines() if "SUM" in line) == [
        "0 2 4 6.0",
        "1 2 4 6.0",
    ]
    assert all(each["argv"] == [*COMMAND, "data.image_root=a [b] c"] for each in probed(done.stdout))
    assert {each["env"]["SIF_JAX_PROCESS_ID"] for each in probed(done.stdout)} == {"0", "1"}


FAIL_AT_ONE = """
import time
open(f"{sys.argv[0]}.{os.environ['SIF_JAX_PROCESS_ID']}", "w").write(str(os.getpid()))
if os.environ["SIF_JAX_PROCESS_ID"] == "1":
    time.sleep(0.5)
    sys.exit(CODE)
time.sleep(600)
"""


@pytest.mark.parametrize(("code", "rounds"), [(7, 2), (2, 1)])
def test_when_one_process_fails_the_others_are_stopped_and_only_bad_input_is_not_tried_again(code, rounds, tmp_path):
    program = probe(tmp_path, FAIL_AT_ONE.replace("CODE", str(code)))
    done = launch(write_target(tmp_path, "local", program=program, restarts=1))
    assert done.returncode == code
    assert done.stderr.count(f"error: process 1 exited with {code}; the other 1 were stopped") == rounds
    assert ("starting again, 1 restart(s) left" in done.stderr) == (rounds == 2)
    assert not alive(int((tmp_path / "probe.py.0").read_text()))


def test_processes_that_were_preempted_are_started_again_though_nothing_failed(tmp_path):
    body = FAIL_AT_ONE.replace("CODE", "int(os.environ['SIF_JAX_PREEMPTED_EXIT_CODE'])")
    done = launch(write_target(tmp_path, "local", program=probe(tmp_path, body), restarts=1))
    assert done.returncode == 75
    assert done.stderr.count("error: process 1 was preempted, its state is saved") == 2
    assert "starting again, 1 restart(s) left" in done.stderr


def test_a_launcher_that_is_ended_ends_what_it_started(tmp_path):
    program = probe(tmp_path, FAIL_AT_ONE.replace('== "1"', '== "9"'))
    command = [sys.executable, ROOT / "launch" / "run.py", write_target(tmp_path, "local", program=program), *COMMAND]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as launcher:
        files = [tmp_path / f"probe.py.{index}" for index in range(2)]
        assert wait_for(lambda: all(file.is_file() and file.read_text() for file in files))
        launcher.send_signal(signal.SIGTERM)
        assert launcher.wait(timeout=30) == 128 + signal.SIGTERM
    assert wait_for(lambda: not any(alive(int(file.read_text())) for file in files))


SLEEP = """
import time
open(f"{sys.argv[0]}.pid", "w").write(str(os.getpid()))
time.sleep(600)
"""


def test_hosts_of_ssh_get_their_numbers_and_words_through_two_shells(tmp_path):
    fake_command(tmp_path, "ssh", SSH)
    target = write_target(tmp_path, "ssh", program=probe(tmp_path), env={"NOTE": "it's $HOME"})
    done = launch(target, *COMMAND, "data.image_root=it's [a] $HOME", env=fake_path(tmp_path))
    assert done.returncode == 0, done.stderr
    found = {each["env"]["SIF_JAX_PROCESS_ID"]: each for each in probed(done.stdout)}
    assert sorted(found) == ["0", "1"]
    for each in found.values():
        assert each["argv"] == [*COMMAND, "data.image_root=it's [a] $HOME"]
        assert each["env"]["SIF_JAX_COORDINATOR"] == "gpu-a:8476"
        assert each["env"]["SIF_JAX_NUM_PROCESSES"] == "2"


def test_when_a_host_is_down_the_others_are_stopped_and_the_error_names_it(tmp_path):
    fake_command(tmp_path, "ssh", SSH)
    target = write_target(tmp_path, "ssh", hosts=["gpu-a", "me@down"], program=probe(tmp_path, SLEEP), restarts=0)
    done = launch(target, env=fake_path(tmp_path))
    assert done.returncode == 255
    assert "error: me@down exited with 255; ssh itself failed; the other 1 were stopped" in done.stderr
    assert not alive(int((tmp_path / "probe.py.pid").read_text()))


def test_a_host_stops_when_the_launching_machine_vanishes(tmp_path):
    fake_command(tmp_path, "ssh", SSH)
    target = write_target(tmp_path, "ssh", hosts=["gpu-a"], program=probe(tmp_path, SLEEP))
    command = [sys.executable, ROOT / "launch" / "run.py", target, *COMMAND]
    with subprocess.Popen(command, env=fake_path(tmp_path), stdout=subprocess.DEVNULL) as launcher:
        file = tmp_path / "probe.py.pid"
        assert wait_for(lambda: file.is_file() and file.read_text())
        launcher.kill()
    assert wait_for(lambda: not alive(int(file.read_text())))
