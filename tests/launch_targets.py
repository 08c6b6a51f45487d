"""Targets and stand-ins for cluster commands, for the tests of the launcher."""

import json
import os
import sys
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[1]
COMMAND = ("sft", "configs/demo/sft.yaml", "model.path=m", "data.path=d")
SMALL = {
    "local": {},
    "node": {},
    "ssh": {"hosts": ["gpu-a", "me@gpu-b"], "workdir": str(ROOT)},
    "slurm": {"partition": "gpu", "account": "lab"},
    "gke": {"image": "registry/sif:1", "volume_claim": "sif"},
    "tpu-queued": {"project": "proj", "bucket": "buck", "workdir": "~/sif jax", "poll_s": 1},
}
# Tells what it was given, and the three variables or the one that says that JAX finds out by itself.
PROBE = """
import json, os, sys
names = [name for name in os.environ if name.startswith("SIF_JAX_")]
print("PROBE", json.dumps({"argv": sys.argv[1:], "env": {name: os.environ[name] for name in sorted(names)}}), flush=True)
"""


def write_target(directory: Path, kind: str, **changes) -> Path:
    path = directory / f"{kind}.yaml"
    path.write_text(yaml.safe_dump({"kind": kind, **SMALL[kind], **changes}))
    return path


def probe(directory: Path, more: str = "") -> list[str]:
    """A program that prints one line of JSON, and then does what `more` says."""
    path = directory / "probe.py"
    path.write_text(PROBE + more)
    return [sys.executable, str(path)]


def probed(output: str) -> list[dict]:
    return [json.loads(line.partition("PROBE ")[2]) for line in output.splitlines() if "PROBE " in line]


def fake_command(directory: Path, name: str, text: str) -> None:
    """Put a stand-in first on PATH: see `fake_path`."""
    path = directory / "bin" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


def fake_path(directory: Path) -> dict[str, str]:
    return os.environ | {"PATH": f"{directory / 'bin'}:{os.environ['PATH']}"}
