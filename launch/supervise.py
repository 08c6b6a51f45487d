"""Run a plan's processes together: the first that fails stops the others, and is named (io)."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from launch.plan import File, Plan, Process
from launch.script import PREEMPTED, STOP_GRACE_S
from sif_jax.errors import InputError

POLL_S = 0.1
BAD_INPUT = 2


class Running(NamedTuple):
    process: Process
    popen: subprocess.Popen[str]
    reader: threading.Thread | None


class Failure(NamedTuple):
    name: str
    code: int

    def __str__(self) -> str:
        if self.code == PREEMPTED:
            return f"{self.name} was preempted, its state is saved"
        how = f"ended by signal {-self.code}" if self.code < 0 else f"exited with {self.code}"
        return f"{self.name} {how}" + ("; ssh itself failed" if self.code == 255 else "")


def execute(plan: Plan) -> int:
    """Write the files, run the processes, start afresh after failures while restarts are left; returns the exit code."""
    check_programs(plan.processes)
    write(plan.files)
    for left in range(plan.restarts, -1, -1):
        failure = run_together(plan.processes)
        if failure is None:
            return 0
        others = f"; the other {len(plan.processes) - 1} were stopped" if len(plan.processes) > 1 else ""
        again = left > 0 and failure.code != BAD_INPUT
        end = f"; starting again, {left} restart(s) left" if again else ""
        print(f"error: {failure}{others}{end}", file=sys.stderr)
        if not again:
            return failure.code if failure.code > 0 else 128 - failure.code
    raise AssertionError("the last round returns")


def check_programs(processes: Iterable[Process]) -> None:
    """
    Raises:
      InputError: what a process starts with cannot be run here.
    """
    for process in processes:
        if shutil.which(process.argv[0]) is None:
            fix = "make .venv/.demo" if process.argv[0].startswith(".venv/") else "install it, or launch where it is"
            raise InputError("not a program here", value=process.argv[0], expected="a program on PATH", fix=fix)


def write(files: Iterable[File]) -> None:
    for file in files:
        path = Path(file.path)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(file.text)


def run_together(processes: Sequence[Process]) -> Failure | None:
    """None when all of them succeed. Whatever ends this early, none is left running."""
    running: list[Running] = []
    try:
        for process in processes:
            running.append(_start(process, labelled=len(processes) > 1))
        return _wait(running)
    finally:
        _stop(running)


def _start(process: Process, *, labelled: bool) -> Running:
    """In its own session, so that its children can be stopped with it; several label their lines of output."""
    popen = subprocess.Popen(
        process.argv,
        env=os.environ | process.env,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE if labelled else None,
        stderr=subprocess.STDOUT if labelled else None,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    if not labelled:
        return Running(process, popen, None)
    reader = threading.Thread(target=_label, args=(process.name, popen), daemon=True)
    reader.start()
    return Running(process, popen, reader)


def _label(name: str, popen: subprocess.Popen[str]) -> None:
    assert popen.stdout is not None
    for line in popen.stdout:
        print(f"[{name}] {line}", end="", flush=True)


def _wait(running: Sequence[Running]) -> Failure | None:
    while True:
        codes = [(each.process.name, each.popen.poll()) for each in running]
        failed = next((Failure(name, code) for name, code in codes if code), None)
        if failed or all(code == 0 for _, code in codes):
            return failed
        time.sleep(POLL_S)


def _stop(running: Sequence[Running]) -> None:
    """Ask all, then wait for each; what does not heed is killed."""
    for each in running:
        if each.popen.poll() is None:
            _ask(each)
    deadline = time.monotonic() + STOP_GRACE_S + 15
    for each in running:
        _await_end(each, deadline)
        if each.reader is not None:
            each.reader.join(timeout=5)


def _ask(each: Running) -> None:
    assert each.popen.stdin is not None
    each.popen.stdin.close()
    if each.process.stop == "term":
        _signal(each, signal.SIGTERM)


def _await_end(each: Running, deadline: float) -> None:
    try:
        each.popen.wait(timeout=max(deadline - time.monotonic(), 0))
    except subprocess.TimeoutExpired:
        _signal(each, signal.SIGKILL)
        each.popen.wait()


def _signal(each: Running, number: signal.Signals) -> None:
    try:
        os.killpg(each.popen.pid, number)
    except ProcessLookupError:
        return  # it ended meanwhile
