"""What a launch starts: files to write and processes to run, and how both are shown (pure)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Literal, NamedTuple

from launch.script import join, quote


class File(NamedTuple):
    path: str  # relative to the checkout
    text: str


class Process(NamedTuple):
    """`stop` says how it is ended early: by SIGTERM, or by the end of its input, which also reaches the far side of ssh."""

    name: str
    argv: tuple[str, ...]
    env: Mapping[str, str]  # beside what the launcher inherits
    stop: Literal["term", "eof"] = "term"


class Plan(NamedTuple):
    title: str
    files: tuple[File, ...]
    processes: tuple[Process, ...]  # started together; the first that fails stops the others
    restarts: int = 0  # of all processes, after a failure that is not bad input
    note: str = ""  # what to do next


def show(plan: Plan) -> str:
    """Everything a launch would start, in full."""
    return "\n".join(_lines(plan)) + "\n"


def _lines(plan: Plan) -> Iterator[str]:
    yield f"# {plan.title}; restarts by the launcher: {plan.restarts}"
    for file in plan.files:
        yield f"# --- writes {file.path}"
        yield file.text.rstrip("\n")
    for process in plan.processes:
        yield f"# --- starts {process.name}"
        yield from (f"{name}={quote(value)} \\" for name, value in process.env.items())
        yield join(process.argv)
    if plan.note:
        yield f"# --- then: {plan.note}"
