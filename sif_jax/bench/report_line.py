"""What every bench prints: a table, the machine it was measured on, and one line of JSON (io)."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import jax

Figures = dict[str, Any]


def machine() -> Figures:
    device = jax.devices()[0]
    return {
        "device": f"{jax.device_count()} x {device.device_kind}",
        "machine": f"{platform.machine()}, {_cpu_name()}",
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "jax": jax.__version__,
        "date": date.today().isoformat(),
        "commit": _commit(),
    }


def text_report(
    figures: Mapping[str, Any], header: Sequence[str], rows: Sequence[Sequence[str]], *, facts: str | None = None
) -> str:
    """A Markdown table, what it does not say, the machine, and all figures as the last line."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    where = ", ".join(f"{name} {value}" for name, value in figures["machine"].items())
    return "\n\n".join(filter(None, [table, facts, f"{where}\n{json_line(figures)}"]))


def json_line(figures: Mapping[str, Any]) -> str:
    return json.dumps(figures)


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if not info.is_file():
        return platform.processor()
    names = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _commit() -> str:
    git = shutil.which("git")
    if git is None:
        return "unknown"
    command = [git, "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or "unknown"
