"""What ends a command early: a user's input, as one clear line, or the cluster (pure)."""

from __future__ import annotations

from pathlib import Path

PREEMPTED_EXIT_CODE = "SIF_JAX_PREEMPTED_EXIT_CODE"


class InputError(ValueError):
    """Bad input: says the file, the row, the value met, what was expected and the fix. The CLI prints it and exits with 2."""

    shared = False  # raised by every process of a job at the same point

    def __init__(
        self,
        problem: str,
        *,
        file: str | Path | None = None,
        row: int | str | None = None,
        value: object = None,
        expected: str | None = None,
        fix: str | None = None,
    ) -> None:
        where = ": ".join(str(part) for part in (file, None if row is None else f"row {row}") if part is not None)
        shown = repr(value)
        clauses = [f"{where}: {problem}" if where else problem]
        if value is not None:
            clauses.append(f"got {shown if len(shown) <= 120 else shown[:117] + '...'}")
        if expected:
            clauses.append(f"expected {expected}")
        if fix:
            clauses.append(f"fix: {fix}")
        super().__init__("; ".join(clauses).replace("\n", " "))


class PreemptedError(Exception):
    """The run was told to end and saved itself. The CLI prints it and exits with 0, or SIF_JAX_PREEMPTED_EXIT_CODE."""
