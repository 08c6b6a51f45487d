"""Several processes: start them, exchange small values, agree on errors and on who holds what (io).

Set SIF_JAX_COORDINATOR (host:port of process 0), SIF_JAX_NUM_PROCESSES and SIF_JAX_PROCESS_ID, or SIF_JAX_DISTRIBUTED=auto
where JAX can tell them itself (TPU pods, GKE, SLURM). Without either, a job is one process.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax._src import distributed
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from jaxtyping import Int

from sif_jax.errors import InputError
from sif_jax.parallel.partition import RULES
from sif_jax.parallel.placement import Shard

NAMES = ("SIF_JAX_COORDINATOR", "SIF_JAX_NUM_PROCESSES", "SIF_JAX_PROCESS_ID")
AUTO, TIMEOUT = "SIF_JAX_DISTRIBUTED", "SIF_JAX_INIT_TIMEOUT_S"
DEFAULT_TIMEOUT_S = 300
HEARTBEAT = "SIF_JAX_HEARTBEAT_TIMEOUT_S"
DEFAULT_HEARTBEAT_S = 100  # JAX's own; long enough for a Python thread that waits while a file of weights is mapped
JAX_LATER_S = 30  # JAX aborts with a stack trace where a process is silent, so `parallel/job.py` comes first
SHUTDOWN_TIMEOUT_S = 60


def start_processes(environment: Mapping[str, str] = os.environ) -> None:
    """Join the job that the environment describes; call it before anything asks JAX for its devices.

    Raises:
      InputError: the environment says half of what is needed, or nonsense.
    """
    arguments = read_environment(environment)
    if arguments is None or jax.distributed.is_initialized():
        return
    timeout_s = _whole_number(environment, TIMEOUT, least=1) if TIMEOUT in environment else DEFAULT_TIMEOUT_S
    where = arguments.get("coordinator_address", "the coordinator that JAX found")
    # JAX's own timeout aborts the process with a stack trace, so ours comes first.
    with _exits_after(timeout_s, f"not every process met at {where} within {timeout_s} s"):
        jax.distributed.initialize(
            **arguments,
            initialization_timeout=2 * timeout_s + 60,
            heartbeat_timeout_seconds=heartbeat_timeout_s(environment) + JAX_LATER_S,
            shutdown_timeout_seconds=SHUTDOWN_TIMEOUT_S,
        )


def heartbeat_timeout_s(environment: Mapping[str, str] = os.environ) -> int:
    """How long a process may be silent.

    Raises:
      InputError: the environment says nonsense.
    """
    return _whole_number(environment, HEARTBEAT, least=1) if HEARTBEAT in environment else DEFAULT_HEARTBEAT_S


def coordination() -> tuple[Any, int, int] | None:
    """(client of the coordination service, this process, their number); None: no job was joined.

    JAX has no public way to its key-value store; Orbax goes the same way.
    """
    joined = distributed.global_state
    return None if joined.client is None else (joined.client, joined.process_id, joined.num_processes)


def read_environment(environment: Mapping[str, str]) -> dict[str, Any] | None:
    """Arguments of `jax.distributed.initialize`; None: one process.

    Raises:
      InputError: the environment says half of what is needed, or nonsense.
    """
    given = [name for name in NAMES if environment.get(name)]
    auto = environment.get(AUTO)
    if auto not in (None, "", "auto"):
        raise InputError(f"wrong value of {AUTO}", value=auto, expected="auto, or unset")
    if auto:
        return {}
    if not given:
        return None
    if missing := sorted(set(NAMES) - set(given)):
        raise InputError(
            f"{missing[0]} is not set", expected=f"{', '.join(NAMES)}, all three", fix=f"set it, or {AUTO}=auto"
        )
    address, count = environment[NAMES[0]], _whole_number(environment, NAMES[1], least=1)
    index = _whole_number(environment, NAMES[2], least=0)
    if not address.rpartition(":")[0] or not address.rpartition(":")[2].isdigit():
        raise InputError(f"wrong value of {NAMES[0]}", value=address, expected="host:port of process 0")
    if index >= count:
        raise InputError(f"wrong value of {NAMES[2]}", value=index, expected=f"0 to {count - 1}")
    return {"coordinator_address": address, "num_processes": count, "process_id": index}


def _whole_number(environment: Mapping[str, str], name: str, *, least: int) -> int:
    text = environment[name]
    if not text.isdigit() or int(text) < least:
        raise InputError(f"wrong value of {name}", value=text, expected=f"a whole number, {least} or more")
    return int(text)


@contextmanager
def _exits_after(seconds: int, problem: str) -> Iterator[None]:
    """Ends the process with one line where a call that cannot be interrupted takes longer."""

    def end() -> None:
        fix = f"check {NAMES[0]}, the network and that all {NAMES[1]} processes run, or raise {TIMEOUT}"
        print(f"error: {InputError(problem, fix=fix)}", file=sys.stderr, flush=True)
        os._exit(2)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def is_first() -> bool:
    """Whether this process logs and writes for all."""
    return jax.process_index() == 0


def gather_bytes(data: bytes) -> list[bytes]:
    """What every process gives, on every process; all call it."""
    if jax.process_count() == 1:
        return [data]
    sizes = np.asarray(multihost_utils.process_allgather(np.array([len(data)], np.int32))).reshape(-1)
    padded = np.zeros(sizes.max(), np.uint8)
    padded[: len(data)] = np.frombuffer(data, np.uint8)
    rows = np.asarray(multihost_utils.process_allgather(padded))
    return [row[:size].tobytes() for row, size in zip(rows, sizes, strict=True)]


def gather_json(value: Any) -> list[Any]:
    return [json.loads(text) for text in gather_bytes(json.dumps(value).encode())]


def gather_rows(own: Sequence[int], shard: Shard) -> Int[np.ndarray, " row"]:
    """A number of every row of a batch, from the rows that each process loaded."""
    if shard.count == 1:
        return np.array(own)
    by_shard = {index: numbers for index, numbers in gather_json((shard.index, list(own)))}  # some hold the same rows
    return np.array([number for part in range(shard.count) for number in by_shard[part]])


def own_run(count: int) -> slice:
    """What this process does of `count` things: equal runs, the first ones longer where they do not divide."""
    runs = np.array_split(np.arange(count), jax.process_count())
    ends = np.cumsum([len(run) for run in runs])
    index = jax.process_index()
    return slice(int(ends[index] - len(runs[index])), int(ends[index]))


def raise_together(error: InputError | None, kind: type[InputError] = InputError) -> None:
    """Every process raises the first error that any of them has; all call it."""
    if error is not None and jax.process_count() == 1:
        raise error
    for message in gather_json(None if error is None else str(error)):
        if message is not None:
            raise shared(kind(message))


def by_first(write: Callable[[], object]) -> None:
    """Done by the first process alone; all call it.

    Raises:
      InputError: on every process, where the first met one.
    """
    problem = None
    if is_first():
        try:
            write()
        except InputError as error:
            problem = error
    raise_together(problem)


def shared(error: InputError) -> InputError:
    """Marks what every process raises at the same point."""
    error.shared = True
    return error


def check_processes_agree(settings: Mapping[str, Any]) -> None:
    """
    Raises:
      InputError: on every process, where two of them were started with different settings, or from different code.
    """
    everyone = gather_json(dict(settings) | {"code": code_digest()})
    for key in sorted({key for each in everyone for key in each}):
        values = [each.get(key, "absent") for each in everyone]
        other = next((index for index, value in enumerate(values) if value != values[0]), None)
        if other is not None:
            raise shared(
                InputError(
                    f"the processes were started with different {key}",
                    value=f"{values[other]} in process {other}",
                    expected=f"{values[0]}, as in process 0",
                    fix="start every process with the same command and the same version of sif_jax",
                )
            )


def code_digest() -> str:
    """Of every source file of this package."""
    root = Path(__file__).parents[1]
    files = sorted(root.rglob("*.py"))
    text = b"".join(str(file.relative_to(root)).encode() + b"\0" + file.read_bytes() for file in files)
    return hashlib.sha256(text).hexdigest()[:16]


def data_shard(mesh: Mesh) -> Shard:
    """Which rows of a batch this process loads: those that its devices hold.

    Raises:
      InputError: the processes' devices do not hold equal runs of rows.
    """
    axes = [axis for axis in mesh.axis_names if axis in RULES["batch"]]
    assert list(mesh.axis_names[: len(axes)]) == axes, "rows vary slowest in the mesh"
    rows = mesh.devices.reshape(int(np.prod([mesh.shape[axis] for axis in axes])), -1)
    mine = [index for index, devices in enumerate(rows) if any(d.process_index == jax.process_index() for d in devices)]
    count, rest = divmod(len(rows), len(mine))
    if rest or mine[0] % len(mine) or mine != list(range(mine[0], mine[0] + len(mine))):
        raise InputError(
            "the mesh cuts across processes unevenly",
            value=f"process {jax.process_index()} holds parts {mine} of {len(rows)}",
            expected="equal runs of parts",
            fix="let mesh.tensor x mesh.sequence divide the devices of a process, or be a multiple of them",
        )
    return Shard(mine[0] // len(mine), count)


def mean_over_processes(values: Sequence[float]) -> list[float]:
    return [float(mean) for mean in np.mean(gather_json(list(values)), axis=0)]
