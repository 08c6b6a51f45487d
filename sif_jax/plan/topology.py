"""The devices that a plan is for: TPU slices and GPUs that need not be here (io)."""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import MutableMapping
from functools import cache
from importlib import metadata
from math import prod
from typing import Any, Literal, NamedTuple

import jax
from jax.experimental import topologies

from sif_jax.errors import InputError
from sif_jax.parallel.chips import ARCHITECTURES, CARDS, TPUS, Card, Chip, chip_of_card

Platform = Literal["tpu", "gpu"]

# What keeps libtpu from looking for a TPU, and several processes from excluding each other.
TPU_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "TPU_ACCELERATOR_TYPE": "v5litepod-16",
    "TPU_LOG_DIR": "disabled",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
AXES = {"v5e": 2, "v6e": 2, "v5p": 3}  # of the torus
CORES = {"v5p": 2}  # per chip; names such as v5p-32 count cores
GPUS_PER_HOST = 8
CUDNN = (9, 8)
EXAMPLES = "v5e:4x4, v5p:2x2x4, v6e:8x8, v5e-16, v5p-32 (16 chips) or gpu:h20x8"


class Topology(NamedTuple):
    name: str  # v5p:2x2x4, gpu:h20x8
    platform: Platform
    chip: Chip
    num_devices: int
    card: Card | None = None


def parse_topology(text: str) -> Topology:
    """
    Raises:
      InputError: no such chip, or no such shape.
    """
    if found := re.fullmatch(r"gpu:([a-z0-9-]+?)x(\d+)", text):
        return _gpus(text, found.group(1), int(found.group(2)))
    if found := re.fullmatch(r"(v\d+[a-z]*):(\d+(?:x\d+)+)", text):
        sizes = tuple(int(size) for size in found.group(2).split("x"))
        return _slice(text, found.group(1), sizes)
    if found := re.fullmatch(r"(v\d+[a-z]*)-(\d+)", text):
        kind = _known(text, found.group(1))
        chips, rest = divmod(int(found.group(2)), CORES.get(kind, 1))
        shape = STANDARD[AXES[kind]].get(chips)
        if rest or shape is None:
            sizes = [chips * CORES.get(kind, 1) for chips in STANDARD[AXES[kind]]]
            raise InputError(
                "no such slice", value=text, expected=f"{kind}- and one of {sizes}, or its shape, {kind}:AxB"
            )
        return _slice(text, kind, shape)
    raise InputError("unknown topology", value=text, expected=EXAMPLES)


# Shapes that Cloud TPU gives slices that are named by their size.
STANDARD: dict[int, dict[int, tuple[int, ...]]] = {
    2: {4: (2, 2), 8: (2, 4), 16: (4, 4), 32: (4, 8), 64: (8, 8), 128: (8, 16), 256: (16, 16)},
    3: {
        4: (2, 2, 1),
        8: (2, 2, 2),
        16: (2, 2, 4),
        32: (2, 4, 4),
        64: (4, 4, 4),
        128: (4, 4, 8),
        256: (4, 8, 8),
        512: (8, 8, 8),
    },
}


def _known(text: str, kind: str) -> str:
    if kind not in TPUS:
        raise InputError("unknown TPU", value=text, expected=f"one of {', '.join(TPUS)}, as in {EXAMPLES}")
    return kind


def _slice(text: str, kind: str, sizes: tuple[int, ...]) -> Topology:
    if len(sizes) != AXES[_known(text, kind)]:
        raise InputError("wrong shape of a slice", value=text, expected=f"{AXES[kind]} numbers after {kind}:")
    return Topology(f"{kind}:{'x'.join(map(str, sizes))}", "tpu", TPUS[kind], prod(sizes))


def _gpus(text: str, card: str, count: int) -> Topology:
    if card not in CARDS:
        raise InputError("unknown GPU", value=text, expected=f"gpu:CARDxCOUNT with one of {', '.join(CARDS)}")
    if not count or (count > GPUS_PER_HOST and count % GPUS_PER_HOST):
        raise InputError("no such number of GPUs", value=count, expected=f"1 to {GPUS_PER_HOST}, or a multiple of it")
    return Topology(text, "gpu", chip_of_card(CARDS[card]), count, CARDS[card])


def set_environment(environment: MutableMapping[str, str] = os.environ) -> None:
    """Before jax looks for devices: it is to find the host alone. What is set already stays, but for the platform."""
    environment["JAX_PLATFORMS"] = "cpu"
    jax.config.update("jax_platforms", "cpu")
    for name, value in TPU_ENVIRONMENT.items():
        environment.setdefault(name, value)


def check_compiler(topology: Topology) -> None:
    """
    Raises:
      InputError: the compiler for these devices is not installed, or is another jax's.
    """
    if topology.platform == "gpu":
        if not any(importlib.util.find_spec(plugin) for plugin in ("jax_cuda12_plugin", "jax_cuda13_plugin")):
            fix = "pip install 'sif_jax[plan-gpu]'"
            raise InputError("the compiler for GPUs is not installed", value=topology.name, fix=fix)
        return
    if importlib.util.find_spec("libtpu") is None:
        fix = "pip install 'sif_jax[plan]' (Linux), or ask for --analytic"
        raise InputError("the compiler for TPUs is not installed", value=topology.name, fix=fix)
    wanted, found = libtpu_of_jax(), metadata.version("libtpu")
    if wanted and not found.startswith(f"{wanted}."):
        fix = f"pip install 'libtpu=={wanted}.*'"
        raise InputError(
            f"libtpu is not the one of jax {jax.__version__}", value=found, expected=f"{wanted}.*", fix=fix
        )


def libtpu_of_jax() -> str | None:
    """The version that jax[tpu] asks for, such as 0.0.42; None where it does not say."""
    asked = (re.match(r"libtpu==([\d.]+)\.\*", requirement) for requirement in metadata.requires("jax") or [])
    return next((found.group(1) for found in asked if found), None)


@cache
def devices_of(topology: Topology) -> tuple[Any, ...]:
    """
    Raises:
      InputError: the compiler is not installed, or knows no such topology.
    """
    check_compiler(topology)
    set_environment()
    try:
        if topology.card is None:
            description = topologies.get_topology_desc(topology.name, "tpu")
        else:
            description = topologies.get_topology_desc(
                platform="cuda", target_config=_target(topology.card), topology=_hosts(topology.num_devices)
            )
    except (jax.errors.JaxRuntimeError, ValueError) as problem:
        reason = str(problem).partition("\n")[0]
        raise InputError("the compiler refuses this topology", value=topology.name, expected=reason) from None
    return tuple(description.devices)


def _hosts(devices: int) -> str:
    return f"1x{max(devices // GPUS_PER_HOST, 1)}x{min(devices, GPUS_PER_HOST)}"


def _target(card: Card) -> str:
    """The description of a card that XLA compiles for, from its data sheet and its architecture's limits."""
    limits = ARCHITECTURES[card.architecture]
    return f"""gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32
  shared_memory_per_block: 49152 shared_memory_per_core: {limits.shared_memory} threads_per_core_limit: {limits.threads}
  core_count: {card.cores} fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: {int(card.bandwidth_gbps * 1e9)} l2_cache_size: {int(card.l2_mib * 2**20)} clock_rate_ghz: {card.clock_ghz}
  device_memory_size: {int(card.memory_gib * 2**30)} shared_memory_per_block_optin: {limits.shared_memory - 1024}
  cuda_compute_capability {{ major: {limits.capability[0]} minor: {limits.capability[1]} }}
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}}
platform_name: "CUDA" dnn_version_info {{ major: {CUDNN[0]} minor: {CUDNN[1]} patch: 0 }} device_description_str: "{card.name}"
"""


def larger(topology: Topology) -> list[Topology]:
    """The next slices of the same chip, or hosts of the same card, up to 256 devices."""
    if topology.card is not None:
        prefix = topology.name.rpartition("x")[0]
        counts = [topology.num_devices * 2**power for power in range(1, 9)]
        return [parse_topology(f"{prefix}x{count}") for count in counts if count <= 256]
    kind = topology.name.partition(":")[0]
    shapes = {chips: shape for chips, shape in STANDARD[AXES[kind]].items() if topology.num_devices < chips <= 256}
    return [_slice(topology.name, kind, shape) for shape in shapes.values()]
