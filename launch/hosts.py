"""Targets whose processes the launcher itself starts: here, on one GPU machine, or on several by ssh (host)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from launch.plan import Plan, Process
from launch.script import PREEMPTED_ENV, quote, tied_to_input, worker_script
from launch.target import LocalTarget, NodeTarget, SshTarget
from sif_jax.errors import InputError

# A host that does not answer for a minute counts as lost; a password prompt would wait for ever.
SSH = ("ssh", "-o", "BatchMode=yes", "-o", "ConnectTimeout=15", "-o", "ServerAliveInterval=15")


def join_env(coordinator: str, num_processes: int, process_id: int) -> dict[str, str]:
    """What a process must know to find the others."""
    return {
        "SIF_JAX_COORDINATOR": coordinator,
        "SIF_JAX_NUM_PROCESSES": str(num_processes),
        "SIF_JAX_PROCESS_ID": str(process_id),
    }


def plan_local(target: LocalTarget, words: Sequence[str]) -> Plan:
    cpu = {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={target.devices_per_process}",
    }
    processes = tuple(
        Process(
            f"process {index}",
            _argv(target, words),
            PREEMPTED_ENV | cpu | join_env(f"127.0.0.1:{target.port}", target.processes, index) | target.env,
        )
        for index in range(target.processes)
    )
    title = f"local: {target.processes} processes of {target.devices_per_process} CPU devices"
    return Plan(title, (), processes, target.restarts)


def plan_node(target: NodeTarget, words: Sequence[str]) -> Plan:
    """One process drives every GPU, so nobody has to be found."""
    first = {} if target.gpus is None else {"CUDA_VISIBLE_DEVICES": ",".join(map(str, range(target.gpus)))}
    process = Process("this machine", _argv(target, words), PREEMPTED_ENV | first | target.env)
    return Plan(f"node: one process, {target.gpus or 'all'} GPUs", (), (process,), target.restarts)


def plan_ssh(target: SshTarget, words: Sequence[str]) -> Plan:
    hosts = _hosts(target)
    coordinator = f"{target.coordinator or hosts[0].rpartition('@')[2]}:{target.port}"
    processes = tuple(
        Process(host, _ssh(target, host, words, join_env(coordinator, len(hosts), index)), {}, "eof")
        for index, host in enumerate(hosts)
    )
    return Plan(f"ssh: {len(hosts)} hosts, {coordinator} coordinates", (), processes, target.restarts)


def read_hostfile(path: str) -> tuple[str, ...]:
    """The first word of every line; `slots=8` and comments are left out, since one process drives all GPUs of a host."""
    try:
        lines = Path(path).read_text().splitlines()
    except OSError as error:
        raise InputError(f"cannot read this hostfile ({error.strerror})", file=path, fix="check hostfile: …") from None
    return tuple(words[0] for line in lines if (words := line.partition("#")[0].split()))


def _argv(target: LocalTarget | NodeTarget, words: Sequence[str]) -> tuple[str, ...]:
    argv = (*target.program, *words)
    return ("bash", "-c", worker_script(argv, {}, setup=target.setup)) if target.setup else argv


def _ssh(target: SshTarget, host: str, words: Sequence[str], join: dict[str, str]) -> tuple[str, ...]:
    script = worker_script((*target.program, *words), join | target.env, setup=target.setup, workdir=target.workdir)
    return (*SSH, *target.ssh_options, host, f"bash -c {quote(tied_to_input(script))}")


def _hosts(target: SshTarget) -> tuple[str, ...]:
    if target.hostfile and target.hosts:
        raise InputError("both hosts and hostfile are given", value=target.hostfile, expected="one of them")
    hosts, where = read_hostfile(target.hostfile) if target.hostfile else target.hosts, target.hostfile or "hosts"
    if not hosts:
        raise InputError("no host", file=where, expected="one host or more", fix="list them under hosts: …")
    wrong = [host for host in hosts if hosts.count(host) > 1 or host.startswith("-") or not host.strip()]
    if wrong:
        raise InputError("not a list of hosts", file=where, value=wrong[0], expected="each host once, by name")
    return hosts
