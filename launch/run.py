"""Start a sif-jax command where a target file says: here, on several hosts, on a cluster or on a TPU pod (io).

python launch/run.py TARGET.yaml [--dry-run] sft configs/paper/sft.yaml key=value …
"""

from __future__ import annotations

import sys
from pathlib import Path


def run() -> int:
    # so that it runs from any directory, with any Python that has click, pydantic and PyYAML
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from launch.cli import main

    return main(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(run())
