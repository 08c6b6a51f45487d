"""Start the command line on a GPU machine: set the environment that XLA reads at import, then run (io).

python -m gpu_compat.launcher sft configs/paper/sft.yaml
"""

from __future__ import annotations

import os
import sys

from gpu_compat.environment import set_environment


def main() -> None:
    if "jax" in sys.modules:
        raise RuntimeError("jax is imported already and would not see the environment; start the launcher first")
    set_environment(os.environ)
    from sif_jax.cli import main as cli

    cli()


if __name__ == "__main__":
    main()
