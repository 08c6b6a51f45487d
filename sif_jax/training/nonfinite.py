"""A run stops at the step whose loss, gradient or weights are NaN or infinite, and leaves what is needed to look into it (io)."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sif_jax.atomic import write_text
from sif_jax.config import TrainConfig
from sif_jax.data.batch import Batch
from sif_jax.data.feed import Feed
from sif_jax.errors import InputError
from sif_jax.parallel.distributed import gather_json, is_first, shared

ROWS_SHOWN = 16


class FiniteCheck:
    """What a run measures at every step has to be finite."""

    def __init__(self, config: TrainConfig, feed: Feed) -> None:
        self._directory, self._file, self._seed, self._feed = (
            config.run.directory,
            config.data.path,
            config.run.seed,
            feed,
        )

    def __call__(
        self, step: int, measured: Mapping[str, float], batches: Sequence[Batch], tensors: Mapping[str, Any]
    ) -> None:
        """Of several processes, all find the same, and each writes the rows that it holds.

        `batches` are the step's micro-batches on the host. `tensors` are trees, such as the gradients and the weights, whose
        leaves that are not finite are named in the dump: `RUN/nonfinite/step-N/{report.json, batch-0.npz, …}`.

        Raises:
          InputError: a number of `measured` is NaN or infinite; it names the step, the rows of the records file and the dump.
        """
        if all(map(math.isfinite, measured.values())):
            return
        rows, dump = [self._rows(batch) for batch in batches], self._directory / "nonfinite" / f"step-{step}"
        report = {
            "step": step,
            "seed": self._seed,
            "measured": {name: str(value) for name, value in measured.items()},
            "file": self._file,
            "rows": rows,
            "nonfinite": {name: _nonfinite(tree) for name, tree in tensors.items()},
        }
        told = f"see {dump}" if _write(dump, report, batches) else f"{dump} could not be written"
        names = ", ".join(f"{name} {value}" for name, value in measured.items() if not math.isfinite(value))
        raise shared(
            InputError(
                f"step {step} is not finite ({names}) with {_shown(sorted({row for batch in rows for row in batch}))}",
                file=self._file,
                expected="finite numbers",
                fix=f"{told}; check these rows, or lower optimizer.learning_rate in a new run; the last checkpoint is intact",
            )
        )

    def _rows(self, batch: Batch) -> list[int]:
        """Of the whole micro-batch, whichever process holds them; counted as in every error, from 1."""
        own = [self._feed.file.rows[index] for row in batch.records for index in row]
        return sorted({row for rows in gather_json(own) for row in rows})


def read_batch(file: str | Path) -> dict[str, np.ndarray]:
    """The arrays of a dumped `batch-I.npz`."""
    with np.load(file, allow_pickle=False) as arrays:
        return dict(arrays)


def _nonfinite(tree: Any) -> dict[str, int]:
    """How many elements of which leaves."""
    counts = jax.jit(lambda tree: jax.tree.map(lambda leaf: jnp.sum(~jnp.isfinite(leaf)), tree))(tree)
    named = jax.tree_util.tree_leaves_with_path(counts)
    found = {jax.tree_util.keystr(path, simple=True, separator="."): int(count) for path, count in named}
    return {name: count for name, count in found.items() if count}


def _write(dump: Path, report: Mapping[str, Any], batches: Sequence[Batch]) -> bool:
    suffix = f"-process-{jax.process_index()}" if jax.process_count() > 1 else ""
    try:
        dump.mkdir(parents=True, exist_ok=True)
        for number, batch in enumerate(batches):
            arrays: Any = {name: np.asarray(x) for name, x in batch.arrays.items()}
            np.savez(dump / f"batch-{number}{suffix}.npz", **arrays)
        if is_first():
            write_text(dump / "report.json", json.dumps(report, indent=1) + "\n")
    except (OSError, InputError):
        return False  # the disk is full, too; the error that is about to be raised matters more
    return True


def _shown(rows: Sequence[int]) -> str:
    more = f" and {len(rows) - ROWS_SHOWN} more" if len(rows) > ROWS_SHOWN else ""
    return f"rows {', '.join(map(str, rows[:ROWS_SHOWN]))}{more}"
