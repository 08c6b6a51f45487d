"""Target files: where a command runs, and what must be edited before it can (host)."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt, field_validator

from sif_jax.config.files import describe, load_config
from sif_jax.config.section import Config
from sif_jax.errors import InputError

Word = Annotated[str, Field(pattern=r"^[\w.,:@/+-]+$")]  # goes into a script unquoted, or into a resource's name
Lines = tuple[str, ...]
GPU_PROGRAM = (".venv/bin/python", "-m", "gpu_compat.launcher")
TPU_PROGRAM = (".venv/bin/sif-jax",)
PLACEHOLDER = re.compile(r"<[^<>]+>")
Kind = Literal["local", "node", "ssh", "slurm", "gke", "tpu-queued"]
T = TypeVar("T", bound="Target")


class Target(Config):
    kind: Kind = Field(description="what starts the processes")
    name: str = Field(default="sif-jax", description="name of the job and of the files written for it")
    program: Annotated[Lines, Field(min_length=1)] = Field(description="what the command's words are given to")
    env: dict[str, str] = Field(default={}, description="environment of every process")
    setup: Lines = Field(default=(), description="shell lines that every host runs first, in the checkout")

    @field_validator("name")
    @classmethod
    def _is_a_dns_label(cls, name: str) -> str:
        if not re.fullmatch(r"[a-z]([a-z0-9-]{0,38}[a-z0-9])?", name):
            raise InputError("not a job name", value=name, expected="at most 40 of a-z, 0-9 and '-', a letter first")
        return name

    @field_validator("env")
    @classmethod
    def _are_variables(cls, env: dict[str, str]) -> dict[str, str]:
        wrong = [name for name in env if not re.fullmatch(r"[A-Za-z_]\w*", name)]
        if wrong:
            raise InputError("not an environment variable's name", value=wrong[0], expected="letters, digits and '_'")
        return env


class LocalTarget(Target):
    kind: Literal["local"]
    program: Lines = TPU_PROGRAM
    processes: PositiveInt = Field(default=2, description="processes on this machine, which talk through gloo")
    devices_per_process: PositiveInt = Field(default=4, description="CPU devices that each process pretends to have")
    port: PositiveInt = Field(default=8476, le=65535, description="port of the coordinator")
    restarts: NonNegativeInt = Field(default=0, description="fresh starts after a failure")


class NodeTarget(Target):
    kind: Literal["node"]
    program: Lines = GPU_PROGRAM
    gpus: PositiveInt | None = Field(default=None, description="use only the first GPUs; null: all")
    restarts: NonNegativeInt = Field(default=3, description="fresh starts after a failure")


class SshTarget(Target):
    kind: Literal["ssh"]
    program: Lines = GPU_PROGRAM
    hosts: tuple[str, ...] = Field(default=(), description="what ssh is given, one process each; the first coordinates")
    hostfile: str | None = Field(default=None, description="a file of hosts instead, one a line, MPI's layout")
    workdir: str = Field(description="the checkout on every host")
    coordinator: Word | None = Field(default=None, description="the first host as the others reach it; null: its name")
    port: PositiveInt = Field(default=8476, le=65535, description="port of the coordinator, open between the hosts")
    ssh_options: tuple[str, ...] = Field(default=(), description="further words for ssh, such as -p and 2222")
    restarts: NonNegativeInt = Field(default=3, description="fresh starts after a failure")


class SlurmTarget(Target):
    kind: Literal["slurm"]
    program: Lines = GPU_PROGRAM
    partition: Word = Field(description="partition")
    account: Word = Field(description="account that pays")
    nodes: PositiveInt = Field(default=2, description="nodes, one process each")
    gpus_per_node: PositiveInt = Field(default=8, description="GPUs of each node")
    cpus_per_node: PositiveInt = Field(default=64, description="CPU cores of each node")
    time: Annotated[str, Field(pattern=r"^[\d:-]+$")] = Field(default="24:00:00", description="limit of one stay")
    options: Lines = Field(default=(), description="further options of sbatch, such as --qos=high")
    restarts: NonNegativeInt = Field(default=20, description="requeues after a failure or the time limit")


class GkeTarget(Target):
    kind: Literal["gke"]
    program: Lines = ("sif-jax",)
    image: str = Field(description="container image with this checkout, see launch/Dockerfile")
    volume_claim: Word = Field(description="PersistentVolumeClaim, ReadWriteMany, that holds data/, ckpt/ and runs/")
    namespace: Word = Field(default="default", description="Kubernetes namespace")
    workdir: str = Field(default="/app", description="the checkout in the image")
    mount: str = Field(default="/mnt/sif", description="where the volume appears")
    accelerator: Word = Field(default="tpu-v5-lite-podslice", description="cloud.google.com/gke-tpu-accelerator")
    topology: Annotated[str, Field(pattern=r"^\d+x\d+(x\d+)?$")] = Field(default="4x4", description="chips of a slice")
    chips_per_host: PositiveInt = Field(default=4, description="chips of one node of the slice")
    slices: PositiveInt = Field(default=1, description="slices, joined over the data-centre network")
    spot: bool = Field(default=True, description="ask for Spot nodes")
    queue: Word | None = Field(default=None, description="Kueue's LocalQueue (xpk: multislice-queue); null: none")
    secret: Word | None = Field(default=None, description="Secret whose keys become environment variables; null: none")
    restarts: NonNegativeInt = Field(default=100, description="restarts of the whole JobSet")


class QueuedTarget(Target):
    kind: Literal["tpu-queued"]
    program: Lines = TPU_PROGRAM
    project: Word = Field(description="Google Cloud project")
    bucket: Word = Field(description="bucket in the TPU's region that holds data/, ckpt/ and runs/")
    zone: Word = Field(default="europe-west4-b", description="zone with quota for the accelerator")
    accelerator: Word = Field(default="v5litepod-16", description="accelerator type")
    runtime: Word = Field(default="v2-alpha-tpuv5-lite", description="runtime version of the TPU VMs")
    spot: bool = Field(default=True, description="ask for Spot capacity, which may be taken away")
    workdir: str = Field(default="~/sif_jax", description="where the checkout is unpacked on every worker")
    poll_s: PositiveInt = Field(default=30, description="seconds between looks at the queued resource")
    restarts: NonNegativeInt = Field(default=100, description="fresh starts after preemptions and failures")


TARGETS: dict[str, type[Target]] = {
    "local": LocalTarget,
    "node": NodeTarget,
    "ssh": SshTarget,
    "slurm": SlurmTarget,
    "gke": GkeTarget,
    "tpu-queued": QueuedTarget,
}


class _AnyTarget(BaseModel):
    model_config = ConfigDict(extra="allow")
    kind: Kind


def load_target(path: str | Path) -> Target:
    """
    Raises:
      InputError: an unreadable file, an unknown kind or key, a wrong value, or an edit that was not made.
    """
    given = load_config(_AnyTarget, path)
    values: dict[str, Any] = given.model_dump()
    kind = TARGETS[given.kind]
    for row in describe(kind):
        if row.default is None and row.key not in values:
            fix = f"add the line {row.key}: …"
            raise InputError(f"{row.key} is missing", file=path, expected=row.description, fix=fix)
    for key, value in values.items():
        _check_edited(path, kind, key, value)
    return load_config(kind, path)


def _check_edited(path: str | Path, kind: type[Target], key: str, value: Any) -> None:
    parts = value if isinstance(value, list) else [value]
    left = [part for part in parts if isinstance(part, str) and PLACEHOLDER.fullmatch(part)]
    if left:
        meaning = next((row.description for row in describe(kind) if row.key == key), "your own value")
        fix = f"put your own value in the line {key}: …"
        raise InputError(f"{key} is still a placeholder", file=path, value=left[0], expected=meaning, fix=fix)
