"""Start the command line on a GPU machine: set the environment that XLA reads at import, then run (io).

python -m gpu_compat.launcher sft configs/paper/sft.yaml
"""

from __future__ import annotations

import os
import sys
from collections.abc import MutableMapping

DEFAULTS = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.92"}  # the rest is NCCL's and the driver's
XLA_FLAGS = ("--xla_gpu_enable_latency_hiding_scheduler=true",)


def set_environment(environment: MutableMapping[str, str]) -> None:
    """Fill in what is not set; flags that the user gave win over ours."""
    for name, value in DEFAULTS.items():
        environment.setdefault(name, value)
    given = environment.get("XLA_FLAGS", "").split()
    names = {flag.partition("=")[0] for flag in given}
    ours = [flag for flag in XLA_FLAGS if flag.partition("=")[0] not in names]
    environment["XLA_FLAGS"] = " ".join([*given, *ours])


def main() -> None:
    if "jax" in sys.modules:
        raise RuntimeError("jax is imported already and would not see the environment; start the launcher first")
    set_environment(os.environ)
    from sif_jax.cli import main as cli

    cli()


if __name__ == "__main__":
    main()
