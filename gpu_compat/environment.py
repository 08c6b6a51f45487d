"""The environment that XLA, NCCL and JAX read when jax is imported, for GPUs (host).

What the user set wins, whatever its name: XLA refuses to start with both the old and the new name of the memory fraction.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from pathlib import Path

from sif_jax.parallel.chips import GPU_MEMORY_FRACTION as MEMORY_FRACTION

MEMORY_NAMES = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")
XLA_FLAGS = ("--xla_gpu_enable_latency_hiding_scheduler=true",)  # collectives beside computation
# NCCL is silent by default about what it cannot use. Nothing else is set: it tunes itself, and better with every version.
NCCL = {"NCCL_DEBUG": "WARN"}


def set_environment(environment: MutableMapping[str, str]) -> None:
    """Fill in what is not set; flags that the user gave win over ours."""
    if not any(name in environment for name in MEMORY_NAMES):
        environment["XLA_PYTHON_CLIENT_MEM_FRACTION"] = str(MEMORY_FRACTION)
    for name, value in (NCCL | {"JAX_COMPILATION_CACHE_DIR": str(_cache(environment))}).items():
        environment.setdefault(name, value)
    given = environment.get("XLA_FLAGS", "").split()
    names = {flag.partition("=")[0] for flag in given}
    ours = [flag for flag in XLA_FLAGS if flag.partition("=")[0] not in names]
    environment["XLA_FLAGS"] = " ".join([*given, *ours])


def _cache(environment: MutableMapping[str, str]) -> Path:
    """Compiled programs, so that a restart does not compile again."""
    home = Path(environment.get("XDG_CACHE_HOME") or Path(environment.get("HOME", "~")).expanduser() / ".cache")
    return home / "sif_jax" / "xla"
