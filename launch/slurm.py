"""SLURM: one batch job over several GPU nodes, requeued until it is done (host)."""

from __future__ import annotations

from collections.abc import Sequence

from launch.plan import File, Plan, Process
from launch.script import quote, worker_script
from launch.target import SlurmTarget

SIGNAL_S = 120  # SIGTERM so long before the time limit


def plan_slurm(target: SlurmTarget, words: Sequence[str]) -> Plan:
    path = f"runs/launch/{target.name}.sbatch"
    submit = Process("sbatch", ("sbatch", path), {})
    title = f"slurm: {target.nodes} nodes of {target.gpus_per_node} GPUs, one process each"
    note = f"squeue --me; tail -f runs/launch/{target.name}-JOB.log; scancel JOB"
    return Plan(title, (File(path, _batch_script(target, words)),), (submit,), note=note)


def _batch_script(target: SlurmTarget, words: Sequence[str]) -> str:
    return "\n".join(["#!/bin/bash", *_directives(target), "set -uo pipefail", _step(target, words), _ending(target)])


def _directives(target: SlurmTarget) -> list[str]:
    """The log is appended to, so that it survives requeues."""
    options = [
        f"--job-name={target.name}",
        f"--partition={target.partition}",
        f"--account={target.account}",
        f"--nodes={target.nodes}",
        "--ntasks-per-node=1",
        f"--gpus-per-node={target.gpus_per_node}",
        f"--cpus-per-task={target.cpus_per_node}",
        f"--time={target.time}",
        f"--output=runs/launch/{target.name}-%j.log",
        "--open-mode=append",
        "--requeue",
        f"--signal=SIGTERM@{SIGNAL_S}",
        *target.options,
    ]
    return [f"#SBATCH {option}" for option in options]


def _step(target: SlurmTarget, words: Sequence[str]) -> str:
    """JAX finds the other tasks by SLURM's variables, but would then take one GPU per task, hence the list of devices."""
    devices = ",".join(map(str, range(target.gpus_per_node)))
    env = {"SIF_JAX_DISTRIBUTED": "auto", "JAX_LOCAL_DEVICE_IDS": devices} | target.env
    script = worker_script((*target.program, *words), env, setup=target.setup)
    srun = f"srun --kill-on-bad-exit=1 --cpus-per-task={target.cpus_per_node} bash -c {quote(script)}"
    return f'cd "$SLURM_SUBMIT_DIR" || exit 2\n{srun}\ncode=$?'


def _ending(target: SlurmTarget) -> str:
    """Code 2 is bad input, which a second try meets again."""
    return f"""echo "exit code $code after ${{SLURM_RESTART_COUNT:-0}} requeues" >&2
case $code in
  0 | 2) exit "$code" ;;
esac
if [ "${{SLURM_RESTART_COUNT:-0}}" -lt {target.restarts} ]; then
  scontrol requeue "$SLURM_JOB_ID" && exit 0
fi
exit "$code"
"""
