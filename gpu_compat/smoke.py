"""Is this machine ready? Versions, devices, rates, one gradient against the CPU, and what is wrong (io).

python -m gpu_compat.smoke [--json] [--platform cpu]      exit code 0 only if all is well
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import MutableMapping, Sequence
from typing import Any

from gpu_compat.cards import card_of
from gpu_compat.diagnosis import Measured, Problem, diagnose
from gpu_compat.environment import set_environment
from gpu_compat.versions import Versions, read_versions

MATMULS = {
    "bfloat16": ("bfloat16", None),
    "float32 (default)": ("float32", None),
    "float32 (highest)": ("float32", "highest"),
}


def prepare(platform: str, environment: MutableMapping[str, str]) -> None:
    """Before jax is imported; the CPU is always there, to compare with."""
    if platform == "cpu":
        environment["JAX_PLATFORMS"] = "cpu"
        return
    set_environment(environment)
    given = environment.get("JAX_PLATFORMS")
    if given and "cpu" not in given.split(","):
        environment["JAX_PLATFORMS"] = f"{given},cpu"


def measure(platform: str) -> Measured:
    """Everything that needs jax; a platform that does not start is told, not raised."""
    import jax

    try:
        devices = jax.devices(platform)
    except RuntimeError as error:  # what JAX raises for a platform without a plugin, a driver or a device
        return Measured(failure=str(error).partition("\n")[0])
    return _measure(platform, devices)


def _measure(platform: str, devices: list[Any]) -> Measured:
    from gpu_compat.measure import SIZES, all_reduce_gbps, matmul_tflops, memory_gbps
    from gpu_compat.parity import gradient_error

    sizes, first = SIZES[platform], devices[0]
    backend, problem = _attention(platform)
    return Measured(
        devices=tuple(device.device_kind for device in devices),
        cuda=_cuda(first),
        memory_gbps=memory_gbps(first, sizes),
        matmul_tflops={name: matmul_tflops(first, sizes, *how) for name, how in MATMULS.items()},
        all_reduce_gbps=all_reduce_gbps(devices, sizes) if len(devices) > 1 else None,
        gradient_error=gradient_error(first),
        attention=backend,
        attention_problem=problem,
    )


def _attention(platform: str) -> tuple[str, str | None]:
    """What `model.attention=auto` takes, and why it is not the platform's own."""
    from sif_jax.ops.attention_choice import NATIVE, choose_backend, why_not

    return choose_backend("auto", "bfloat16"), why_not(NATIVE[platform], "bfloat16") if platform in NATIVE else None


def _cuda(device: Any) -> str | None:
    """12.9 of "PJRT C API\\ncuda 12090"."""
    _, found, number = device.client.platform_version.partition("cuda ")
    digits = number.split()[0] if found else ""
    return f"{int(digits) // 1000}.{int(digits) % 1000 // 10}" if digits.isdigit() else None


def as_dict(platform: str, versions: Versions, measured: Measured, problems: Sequence[Problem]) -> dict[str, Any]:
    return {
        "platform": platform,
        "ok": not problems,
        "versions": versions._asdict(),
        **measured._asdict(),
        "matmul_tflops": dict(measured.matmul_tflops),
        "problems": [problem._asdict() for problem in problems],
    }


def as_text(platform: str, versions: Versions, measured: Measured, problems: Sequence[Problem]) -> str:
    rows = [
        ("jax, jaxlib", f"{versions.jax}, {versions.jaxlib}"),
        ("plugins", ", ".join(f"{name} {version}" for name, version in versions.plugins.items()) or "none"),
        ("driver", f"{versions.driver}, runs CUDA up to {versions.cuda}" if versions.driver else "none"),
        ("cuDNN", versions.cudnn or "none"),
        *(_measured_rows(platform, measured) if measured.devices else []),
    ]
    lines = [f"{name:<28}{value}" for name, value in rows]
    return "\n".join(
        [*lines, *(f"problem: {problem}" for problem in problems), "ready" if not problems else "not ready"]
    )


def _measured_rows(platform: str, measured: Measured) -> list[tuple[str, str]]:
    card = card_of(measured.devices[0])
    sheet = (lambda value: f" (data sheet {value:g})") if card else (lambda value: "")
    several = measured.all_reduce_gbps
    return [
        (
            f"{platform} devices",
            f"{len(measured.devices)} x {measured.devices[0]}" + ("" if card else ", no data sheet here"),
        ),
        *([("CUDA of the plugin", measured.cuda)] if measured.cuda else []),
        ("memory, GB/s", f"{measured.memory_gbps:.1f}" + sheet(card and card.bandwidth_gbps)),
        *((f"{name}, TFLOP/s", f"{rate:.2f}") for name, rate in measured.matmul_tflops.items()),
        ("all-reduce, GB/s", "one device" if several is None else f"{several:.2f}" + sheet(card and card.link_gbps)),
        ("gradient against the CPU", f"off by {measured.gradient_error:.2g} of the largest value"),
        ("attention", measured.attention or "none"),
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m gpu_compat.smoke", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one line of JSON")
    parser.add_argument("--platform", default="gpu", choices=["gpu", "cpu"])
    given = parser.parse_args(arguments)
    prepare(given.platform, os.environ)
    measured, versions = measure(given.platform), read_versions()
    problems = diagnose(given.platform, versions, measured)
    show = (lambda *found: json.dumps(as_dict(*found))) if given.json else as_text
    print(show(given.platform, versions, measured, problems))
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
