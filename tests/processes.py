"""One process of a job of several, which trains on the tiny model (a script), and how tests start such jobs."""

import os
import socket
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np

from tests.conftest import ROOT


def opinion(completion: str, record) -> float:
    """A judge with an opinion on any text, as a random model never answers well."""
    return zlib.crc32(f"{completion}{record.problem}".encode()) % 1000 / 1000


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def start(stage: str, root: Path, count: int, *overrides: str, devices: int = 1) -> list[subprocess.Popen]:
    """`count` processes with `devices` simulated devices each; `overrides` may hold `{process}`."""
    address = f"127.0.0.1:{free_port()}"
    job = {"SIF_JAX_COORDINATOR": address, "SIF_JAX_NUM_PROCESSES": str(count)} if count > 1 else {}
    flags = {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
    started = []
    for index in range(count):
        environment = os.environ | flags | job | ({"SIF_JAX_PROCESS_ID": str(index)} if job else {})
        arguments = [override.replace("{process}", str(index)) for override in overrides]
        started.append(
            subprocess.Popen(
                [sys.executable, "-m", "tests.processes", stage, str(root), *arguments],
                env=environment,
                cwd=ROOT,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    return started


def finish(processes: list[subprocess.Popen], *, timeout: float = 300) -> list[str]:
    """What each printed; all must end well."""
    outputs = [process.communicate(timeout=timeout)[0] for process in processes]
    for process, output in zip(processes, outputs, strict=True):
        assert process.returncode == 0, output[-6000:]
    return outputs


def main() -> None:
    from sif_jax.parallel.distributed import start_processes

    start_processes()
    from sif_jax.config import GrpoConfig, SftConfig
    from sif_jax.data.batch import Collator
    from sif_jax.judge import completions as judging
    from sif_jax.training import grpo, sft
    from tests.tiny_run import tiny_config

    def judge(completions, records):
        print("judged", len(completions), flush=True)
        return np.array([opinion(*pair) for pair in zip(completions, records, strict=True)])

    judging.judge_completions = judge
    collate = Collator.__call__

    def watched(self, rows):
        batch = collate(self, rows)
        print("rows", batch.records, "patches", int(batch.arrays["patch_segments"].any()), flush=True)
        return batch

    Collator.__call__ = watched
    stage, root, *overrides = sys.argv[1:]
    kind, train = {"sft": (SftConfig, sft.train), "grpo": (GrpoConfig, grpo.train)}[stage]
    train(tiny_config(kind, Path(root), *overrides))


if __name__ == "__main__":
    main()
