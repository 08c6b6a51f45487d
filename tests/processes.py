"""One process of a job of several, which trains on the tiny model (a script), and how tests start such jobs."""

import itertools
import os
import resource
import signal
import socket
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from sif_jax.config import EvalConfig, GrpoConfig, SftConfig
from sif_jax.data.batch import Batch, Collator
from sif_jax.data.example import Example
from sif_jax.errors import InputError
from sif_jax.parallel.job import Job
from sif_jax.sif.grammar import Trace
from tests.conftest import ROOT
from tests.tiny_run import tiny_config, tiny_files


def opinion(completion: str, record) -> float:
    """A judge with an opinion on any text, as a random model never answers well."""
    return zlib.crc32(f"{completion}{record.problem}".encode()) % 1000 / 1000


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def start(
    stage: str, root: Path, count: int, *overrides: str, devices: int = 1, **environment: str
) -> list[subprocess.Popen]:
    """`count` processes with `devices` simulated devices each; `overrides` may hold `{process}`."""
    address = f"127.0.0.1:{free_port()}"
    job = {"SIF_JAX_COORDINATOR": address, "SIF_JAX_NUM_PROCESSES": str(count)} if count > 1 else {}
    flags = {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}", "TINY_FILES": str(tiny_files())}
    started = []
    for index in range(count):
        own = {"SIF_JAX_PROCESS_ID": str(index)} if job else {}
        arguments = [override.replace("{process}", str(index)) for override in overrides]
        started.append(
            subprocess.Popen(
                [sys.executable, "-m", "tests.processes", stage, str(root), *arguments],
                env=os.environ | flags | job | own | environment,
                cwd=ROOT,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    return started


def finish(processes: list[subprocess.Popen], *, timeout: float = 900) -> list[str]:
    """What each printed; all must end well."""
    codes, outputs = ends(processes, timeout=timeout)
    for code, output in zip(codes, outputs, strict=True):
        assert code == 0, output[-6000:]
    return outputs


def ends(
    processes: list[subprocess.Popen], *, timeout: float = 900, frozen: int | None = None
) -> tuple[list[int], list[str]]:
    """Exit codes and what each printed; a frozen one is killed after the others have ended, and none is left behind."""
    try:
        for index, process in enumerate(processes):
            if index != frozen:
                process.wait(timeout=timeout)
    finally:
        for process in processes:
            process.kill()
    outputs = [process.communicate()[0] for process in processes]
    return [process.returncode for process in processes], outputs


def damage_an_image() -> None:
    raise InputError("not an image", file="broken.png")


def fill_the_disk() -> None:
    """No file may grow as large as one that every process writes into a checkpoint."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, -1))


FAULTS: dict[str, Callable[[], None]] = {
    "image": damage_an_image,
    "bug": lambda: print({}["a bug"]),
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "freeze": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "disk": fill_the_disk,
}


def without_images(example: Example, image_token_id: int) -> Example:
    """The same words, and nothing to see."""
    kept = example.tokens != image_token_id
    positions = np.repeat(np.arange(kept.sum(), dtype=np.int32)[:, None], 3, axis=1)
    return Example(example.tokens[kept], positions, example.loss_mask[kept], (), example.record_index)


def watch_batches() -> None:
    """Print which rows this process loads; FAULT=NAME@PROCESS strikes there, in the middle of the run; with TEXT_ONLY, the
    second half of a job's rows shows no image."""
    collate, index = Collator.__call__, int(os.environ.get("SIF_JAX_PROCESS_ID", 0))
    count = int(os.environ.get("SIF_JAX_NUM_PROCESSES", 1))
    name, _, where = os.environ.get("FAULT", "").partition("@")
    batches = itertools.count(1)

    def watched(self: Collator, rows: Sequence[Sequence[Example]]) -> Batch:
        if name and int(where) == index and next(batches) == (1 if name == "freeze" else 3):
            print("struck", time.time(), flush=True)
            FAULTS[name]()
        if "TEXT_ONLY" in os.environ:
            first = len(rows) // 2 if count == 1 else (0 if 2 * index >= count else len(rows))
            rows = [
                [without_images(each, self.image_token_id) for each in row] if number >= first else row
                for number, row in enumerate(rows)
            ]
        batch = collate(self, rows)
        print("rows", batch.records, "patches", int(batch.arrays["patch_segments"].any()), flush=True)
        return batch

    Collator.__call__ = watched


def main() -> None:
    from sif_jax.judge import completions as judging
    from sif_jax.judge import openai

    def judge(completions, records):
        print("judged", len(completions), flush=True)
        return np.array([opinion(*pair) for pair in zip(completions, records, strict=True)])

    judging.judge_completions = judge
    watch_batches()
    if "ANY_ANSWER" in os.environ:
        openai.parse = lambda completion: Trace((), completion, ())
    stage, root, *overrides = sys.argv[1:]
    try:
        run_stage(stage, Path(root), overrides)
    except InputError as error:
        print(f"error: {error}", flush=True)
        sys.exit(2)


def run_stage(stage: str, root: Path, overrides: Sequence[str]) -> None:
    with Job():
        from sif_jax.evals.evaluate import evaluate
        from sif_jax.training import grpo, sft

        runs = {"sft": (SftConfig, sft.train), "grpo": (GrpoConfig, grpo.train), "eval": (EvalConfig, evaluate)}
        kind, run = runs[stage]
        run(tiny_config(kind, root, *overrides))


if __name__ == "__main__":
    main()
