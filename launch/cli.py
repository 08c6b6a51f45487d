"""The launcher's command line: read the target, check the command, plan, then show or start it (io)."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Sequence
from os import chdir
from pathlib import Path
from typing import Any, NamedTuple

from launch.command import check_command
from launch.gke import plan_gke
from launch.hosts import plan_local, plan_node, plan_ssh
from launch.plan import Plan, show
from launch.queued import plan_queued
from launch.slurm import plan_slurm
from launch.supervise import execute
from launch.target import load_target
from sif_jax.errors import InputError

ROOT = Path(__file__).resolve().parents[1]
USAGE = "python launch/run.py TARGET.yaml [--dry-run] COMMAND [CONFIG.yaml] [KEY=VALUE]..."
PLANNERS: dict[str, Callable[[Any, Sequence[str]], Plan]] = {
    "local": plan_local,
    "node": plan_node,
    "ssh": plan_ssh,
    "slurm": plan_slurm,
    "gke": plan_gke,
    "tpu-queued": plan_queued,
}


class Request(NamedTuple):
    target: Path
    dry_run: bool
    words: tuple[str, ...]


def parse(arguments: Sequence[str]) -> Request:
    """What stands before the command is ours, what follows is the command's, its own --dry-run included."""
    rest, dry_run = list(arguments), False
    target: Path | None = None
    while rest and (rest[0] == "--dry-run" or target is None):
        word = rest.pop(0)
        if word == "--dry-run":
            dry_run = True
        elif word.startswith("-"):
            raise InputError("unknown option", file="command line", value=word, expected=USAGE)
        else:
            target = Path(word).resolve()
    if target is None:
        fix = "take one of launch/targets/"
        raise InputError("no target", file="command line", expected=USAGE, fix=fix)
    return Request(target, dry_run, tuple(rest))


def make_plan(request: Request) -> Plan:
    target = load_target(_shown(request.target))
    check_command(request.words)
    return PLANNERS[target.kind](target, request.words)


def _shown(path: Path) -> Path:
    """Relative to the checkout where it lies inside."""
    return path.relative_to(ROOT) if path.is_relative_to(ROOT) else path


def _interrupt(number: int, frame: object) -> None:
    raise SystemExit(128 + number)  # unwinds through the supervisor, which stops what it started


def main(arguments: Sequence[str]) -> int:
    if arguments and arguments[0] in ("-h", "--help"):
        targets = ", ".join(sorted(f"launch/targets/{path.name}" for path in ROOT.glob("launch/targets/*.yaml")))
        print(f"{USAGE}\n--dry-run prints everything that would start. Targets: {targets}")
        return 0
    try:
        request = parse(arguments)
        chdir(ROOT)
        plan = make_plan(request)
        if request.dry_run:
            print(show(plan), end="")
            return 0
        signal.signal(signal.SIGTERM, _interrupt)
        signal.signal(signal.SIGINT, _interrupt)
        code = execute(plan)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if code == 0 and plan.note:
        print(plan.note)
    return code
