"""From what was found on a machine to what is wrong with it, each with its fix (pure)."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import NamedTuple

from gpu_compat.cards import Card, card_of
from gpu_compat.versions import Versions

# The oldest driver that JAX's documentation allows for each CUDA.
OLDEST_DRIVER = {"cuda12": 525, "cuda13": 580}
# Of the data sheet; a healthy card reaches 0.8 or more of its memory's, 0.6 or more of its matrix units'.
MEMORY_SHARE, MATMUL_SHARE, LINK_SHARE = 0.6, 0.4, 0.25
GRADIENT_TOLERANCE = 1e-3  # relative to the largest value; float32 sums in another order differ by about 1e-5
INSTALL = "pip install -c constraints.txt -e '.[{kind}]'"


class Problem(NamedTuple):
    what: str
    fix: str

    def __str__(self) -> str:
        return f"{self.what}; fix: {self.fix}"


class Measured(NamedTuple):
    """`None`: not measured, as there was no device, or only one."""

    devices: tuple[str, ...] = ()  # kinds
    cuda: str | None = None  # that the plugin was built for
    memory_gbps: float | None = None
    matmul_tflops: Mapping[str, float] = MappingProxyType({})
    all_reduce_gbps: float | None = None
    gradient_error: float | None = None
    attention: str | None = None
    attention_problem: str | None = None
    failure: str | None = None  # why no device could be used


def diagnose(platform: str, versions: Versions, measured: Measured) -> list[Problem]:
    installed = _installation(versions) if platform == "gpu" else ()
    return [*installed, *_devices(platform, measured), *_rates(measured), *_numbers(measured)]


def _installation(versions: Versions) -> Iterator[Problem]:
    kinds = sorted({name.split("-")[1] for name in versions.plugins})
    if not kinds:
        yield Problem("jax has no CUDA plugin", INSTALL.format(kind="cuda12"))
    if len(kinds) > 1:
        fix = f"pip uninstall {' '.join(name for name in versions.plugins if kinds[0] in name)}"
        yield Problem(f"two CUDA plugins are installed, {' and '.join(kinds)}", fix)
    for name, version in versions.plugins.items():
        if version != versions.jaxlib:
            fix = f"pip install {name}=={versions.jaxlib}"
            yield Problem(f"{name} is {version}, but jaxlib is {versions.jaxlib}", fix)
    if versions.cudnn is None:
        install = INSTALL.format(kind=kinds[0] if kinds else "cuda12")
        yield Problem("cuDNN 9 is missing", f"{install}, which brings it; or put libcudnn.so.9 on LD_LIBRARY_PATH")
    yield from _driver(versions, kinds)


def _driver(versions: Versions, kinds: list[str]) -> Iterator[Problem]:
    if versions.driver is None:
        yield Problem("there is no NVIDIA driver", "install it; in a container, start it with --gpus all")
        return
    oldest = max((OLDEST_DRIVER[kind] for kind in kinds), default=0)
    major = re.match(r"\d+", versions.driver)
    if major and int(major[0]) < oldest:
        older = " or use '.[cuda12]'" if "cuda13" in kinds else ""
        yield Problem(f"driver {versions.driver} is older than {oldest}", f"update the driver{older}")


def _devices(platform: str, measured: Measured) -> Iterator[Problem]:
    if measured.failure is not None:
        yield Problem(
            f"no {platform.upper()} can be used: {measured.failure}",
            "look at nvidia-smi, CUDA_VISIBLE_DEVICES and JAX_PLATFORMS",
        )
    elif len(set(measured.devices)) > 1:
        kinds = ", ".join(sorted(set(measured.devices)))
        yield Problem(f"the devices differ: {kinds}", "choose equal ones with CUDA_VISIBLE_DEVICES")


def _rates(measured: Measured) -> Iterator[Problem]:
    """Held against the data sheet, where the card is known."""
    card = card_of(measured.devices[0]) if measured.devices else None
    if card is None:
        return
    for name, rate, sheet, share, fix in _claims(card, measured):
        if rate is not None and not rate >= share * sheet:
            yield Problem(f"{name} is {rate:.0f}, {rate / sheet:.0%} of the data sheet's {sheet:.0f}", fix)


def _claims(card: Card, measured: Measured) -> Iterator[tuple[str, float | None, float, float, str]]:
    busy = "nvidia-smi: is another process, MIG or a power cap on the card? is it hot?"
    yield "memory bandwidth in GB/s", measured.memory_gbps, card.bandwidth_gbps, MEMORY_SHARE, busy
    rate = measured.matmul_tflops.get("bfloat16")
    yield "bfloat16 matrix rate in TFLOP/s", rate, card.bfloat16_tflops, MATMUL_SHARE, busy
    link = "nvidia-smi topo -m: are the cards linked? NCCL_DEBUG=INFO tells what NCCL uses"
    yield "all-reduce bandwidth in GB/s", measured.all_reduce_gbps, card.link_gbps, LINK_SHARE, link


def _numbers(measured: Measured) -> Iterator[Problem]:
    error = measured.gradient_error
    if error is not None and not error <= GRADIENT_TOLERANCE:
        fix = "unset XLA_FLAGS and NVIDIA_TF32_OVERRIDE; then report it with this output"
        yield Problem(f"a gradient is off by {error:.2g} of its largest value, at most {GRADIENT_TOLERANCE:g}", fix)
    if measured.attention_problem is not None:
        fix = "update cuDNN; until then xla attention is used, which is slower"
        yield Problem(measured.attention_problem, fix)
