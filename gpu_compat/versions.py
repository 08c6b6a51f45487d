"""What is installed: driver, CUDA, cuDNN, jax and its CUDA plugins; asked without importing jax (io)."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

PLUGINS = ("jax-cuda12-plugin", "jax-cuda12-pjrt", "jax-cuda13-plugin", "jax-cuda13-pjrt")


class Versions(NamedTuple):
    jax: str
    jaxlib: str
    plugins: dict[str, str]  # the installed ones of PLUGINS
    driver: str | None
    cuda: str | None  # newest that the driver runs
    cudnn: str | None


def read_versions() -> Versions:
    plugins = {name: found for name in PLUGINS if (found := _package(name))}
    driver, cuda = _driver()
    return Versions(_package("jax") or "none", _package("jaxlib") or "none", plugins, driver, cuda, _cudnn())


def _package(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _driver() -> tuple[str | None, str | None]:
    """(driver, CUDA), by the table that nvidia-smi prints; None where there is no nvidia-smi or it finds no driver."""
    if shutil.which("nvidia-smi") is None:
        return None, None
    done = subprocess.run(["nvidia-smi"], capture_output=True, text=True)
    return (
        (_after(done.stdout, "Driver Version:"), _after(done.stdout, "CUDA Version:"))
        if done.returncode == 0
        else (None, None)
    )


def _after(text: str, label: str) -> str | None:
    words = text.partition(label)[2].split()
    return words[0] if words else None


def _cudnn() -> str | None:
    """The library's own answer: of the wheel if there is one, else of the system."""
    for path in [*_in_wheels("libcudnn.so.9"), "libcudnn.so.9"]:
        try:
            number = ctypes.CDLL(path).cudnnGetVersion()
        except OSError:
            continue
        return f"{number // 10000}.{number // 100 % 100}.{number % 100}"
    return None


def _in_wheels(library: str) -> list[str]:
    """NVIDIA's wheels put it into nvidia/cudnn/lib, or, as those of CUDA 13 do with the rest, into nvidia/cu13/lib."""
    spec = find_spec("nvidia")
    folders = list(spec.submodule_search_locations or []) if spec else []
    return [str(path) for folder in folders for path in sorted(Path(folder).glob(f"*/lib/{library}"))]
