#!/usr/bin/env bash
# One machine with any number of GPUs, all of them used by one process:  launch/gpu_node.sh sft configs/paper/sft.yaml key=value …
set -euo pipefail
cd "$(dirname "$0")/.."
[ -x .venv/bin/python ] || { python3 -m venv .venv && .venv/bin/python -m pip install -c constraints.txt -e '.[cuda12]'; }
exec .venv/bin/python -m gpu_compat.launcher "$@"
