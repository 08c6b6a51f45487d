"""The shell text that one host runs: change directory, set up, export, become the program (pure)."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from sif_jax.errors import PREEMPTED_EXIT_CODE

STOP_GRACE_S = 120  # between SIGTERM and SIGKILL, as on the clusters: time to save
PREEMPTED = 75  # EX_TEMPFAIL of sysexits.h: a run that saved itself and is not finished; by hand it ends with 0
PREEMPTED_ENV = {PREEMPTED_EXIT_CODE: str(PREEMPTED)}


def worker_script(
    argv: Sequence[str], env: Mapping[str, str], *, setup: Sequence[str] = (), workdir: str | None = None
) -> str:
    """Lines for `bash -c`; every word of `argv` and every value reaches the program as it is."""
    lines = ["set -euo pipefail"]
    lines += [] if workdir is None else [f"cd {quote_path(workdir)}"]
    env = PREEMPTED_ENV | dict(env)
    lines += [*setup, *(f"export {name}={quote(value)}" for name, value in env.items())]
    return "\n".join([*lines, f"exec {join(argv)}"]) + "\n"


def quote(word: str) -> str:
    """As `shlex.quote`, but a quote within is written '\\'', which stays readable when it is quoted again."""
    if re.fullmatch(r"[\w@%+=:,./-]+", word, re.ASCII):
        return word
    return "'" + word.replace("'", r"'\''") + "'"


def join(words: Sequence[str]) -> str:
    return " ".join(map(quote, words))


def quote_path(path: str) -> str:
    """Quoted for a shell, except for a leading `~/`, which is the far side's home."""
    return f"~/{quote(path[2:])}" if path.startswith("~/") else quote(path)


def tied_to_input(script: str) -> str:
    """The same, stopped with its children when standard input ends.

    ssh ends the input of what it runs when the connection closes, for whatever reason, but leaves it running.
    """
    return f"""set -m
exec 3<&0
(
{script}) </dev/null 3<&- & run=$!
{{ cat >/dev/null; kill -TERM -- "-$run"; sleep {STOP_GRACE_S}; kill -KILL -- "-$run"; }} <&3 2>/dev/null & watch=$!
exec 3<&-
code=0
wait "$run" || code=$?
kill -TERM -- "-$watch" 2>/dev/null
exit "$code"
"""
