"""Checksums of a checkpoint's files, written before it gets its name and held against the files before they are read (io).

Orbax and TensorStore (0.12, 0.1.86) check their index nodes alone: a byte changed in the values of an array, with zarr and with
zarr3, is read as if nothing had happened. CRC-32 finds every change of up to 32 neighbouring bits.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax

from sif_jax.errors import InputError
from sif_jax.parallel.distributed import raise_together

NAME = "checksums.json"
WRITTEN_LATER = {"_CHECKPOINT_METADATA", "commit_success.txt"}  # by Orbax, at the top; a restore does without them
CHUNK = 1 << 24  # bytes


def write_checksums(checkpoint: Path) -> None:
    """Of every file below the directory: its size in bytes and its CRC-32."""
    paths = sorted(path for path in checkpoint.rglob("*") if path.is_file() and path.name != NAME)
    names = [str(path.relative_to(checkpoint)) for path in paths]
    sums = {name: _measure(checkpoint / name) for name in names if name not in WRITTEN_LATER}
    (checkpoint / NAME).write_text(json.dumps(sums, indent=1), encoding="utf-8")


def check_files(checkpoint: Path) -> None:
    """Each process reads a part of the files; all call it.

    Raises:
      InputError: on every process, where one of them finds a file that is missing or is not what was written.
    """
    problem = None
    try:
        sums = _read(checkpoint)
        _check(checkpoint, sorted(sums.items())[jax.process_index() :: jax.process_count()])
    except InputError as error:
        problem = error
    raise_together(problem)


def damaged(checkpoint: Path, file: Path, what: str) -> InputError:
    return InputError(
        f"this checkpoint is damaged: {what}",
        file=file,
        fix=f"delete {checkpoint} to resume from the one before, or restore it from a copy",
    )


def _check(checkpoint: Path, sums: Iterable[tuple[str, Any]]) -> None:
    for name, expected in sums:
        file = checkpoint / name
        try:
            met = _measure(file)
        except OSError as error:
            raise damaged(checkpoint, file, f"the file cannot be read ({error.strerror})") from None
        if met != expected:
            raise damaged(checkpoint, file, f"the file is not what was written (size, CRC-32: {met}, not {expected})")


def _read(checkpoint: Path) -> dict[str, Any]:
    file = checkpoint / NAME
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError):
        raise damaged(checkpoint, file, "its list of files cannot be read") from None


def _measure(file: Path) -> list[int]:
    size = crc = 0
    with file.open("rb") as opened:
        while chunk := opened.read(CHUNK):
            size, crc = size + len(chunk), zlib.crc32(chunk, crc)
    return [size, crc]
