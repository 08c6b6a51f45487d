"""A run of the tiny model in processes of its own, which a hook kills or tells to end (a script), and how tests start one.

It goes through the command line, with as little beside it as possible: it is started many times.
"""

import os
import signal
import subprocess
import sys
from pathlib import Path

from tests.processes import free_port

ROOT = Path(__file__).resolve().parents[1]
SAME_NUMBERS = {  # as in conftest
    "JAX_PLATFORMS": "cpu",
    "HF_HUB_OFFLINE": "1",
    "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".cache" / "jax"),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.5",
    "JAX_DEFAULT_MATMUL_PRECISION": "highest",
}


def start(config: Path, *, hook: str = "", count: int = 1, devices: int = 1) -> list[subprocess.Popen]:
    """`hook` is WHERE:NUMBER:SIGNAL, such as save:2:SIGKILL: what the first process sends itself when it is there."""
    hooks = [hook, *[""] * (count - 1)]
    return start_together("tests.resumable_run", [[str(config), each] for each in hooks], devices)


def start_together(module: str, arguments: list[list[str]], devices: int) -> list[subprocess.Popen]:
    """A process for each list of arguments, joined to one job, with so many simulated devices each."""
    count, address = len(arguments), f"127.0.0.1:{free_port()}"
    job = {"SIF_JAX_COORDINATOR": address, "SIF_JAX_NUM_PROCESSES": str(count)} if count > 1 else {}
    flags = {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
    return [
        subprocess.Popen(
            [sys.executable, "-m", module, *own],
            env=os.environ | SAME_NUMBERS | flags | job | ({"SIF_JAX_PROCESS_ID": str(index)} if job else {}),
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for index, own in enumerate(arguments)
    ]


def _signal_at(hook: str) -> None:
    """Just before the NUMBER-th call of what a WHERE stands for."""
    from sif_jax.rollout import programs
    from sif_jax.training import checkpoint
    from sif_jax.training.metrics import MetricsLog

    where, number, name = hook.split(":")
    owner, function = {
        "save": (checkpoint, "write_checksums"),
        "rollout": (programs, "decode"),
        "log": (MetricsLog, "log"),
    }[where]
    original, left = getattr(owner, function), [int(number)]

    def counted(*args, **kwargs):
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), getattr(signal, name))
        return original(*args, **kwargs)

    setattr(owner, function, counted)


def _say_when_ready() -> None:
    from sif_jax.training import grpo, sft
    from sif_jax.training.metrics import open_log

    def opened(*args, **kwargs):
        log = open_log(*args, **kwargs)
        print("ready", flush=True)
        return log

    for stage in (sft, grpo):
        stage.open_log = opened


def main() -> None:
    import numpy as np

    from sif_jax.cli import main
    from sif_jax.judge import completions as judging
    from tests.processes import opinion

    path, hook = sys.argv[1:]
    judging.judge_completions = lambda *both: np.array([opinion(*pair) for pair in zip(*both, strict=True)])
    _say_when_ready()
    if hook:
        _signal_at(hook)
    main([Path(path).stem, path], prog_name="sif-jax")


if __name__ == "__main__":
    main()
