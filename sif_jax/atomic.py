"""Files and directories that appear whole or not at all (io)."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sif_jax.errors import InputError


@contextmanager
def new_directory(path: Path, *, replace: bool = False) -> Iterator[Path]:
    """A directory to fill, which takes the name `path` when the block ends; an earlier one stays until then.

    Raises:
      InputError: `path` exists and is not to be replaced, or the disk is full or read-only; nothing is left behind.
    """
    if path.exists() and not replace:
        raise InputError("already exists", file=path, fix="choose another directory or remove this one")
    partial = path.with_name(path.name + ".partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
        if replace:
            shutil.rmtree(path, ignore_errors=True)
        partial.rename(path)
    except OSError as error:
        raise InputError(
            f"cannot write ({error.strerror})", file=path, fix="free space or choose another disk"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Write a file, and its folder where that is missing; an earlier one stays until then.

    Raises:
      InputError: the disk is full or read-only.
    """
    partial = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)
    except OSError as error:
        fix = "free space or choose another disk"
        raise InputError(f"cannot write ({error.strerror})", file=path, fix=fix) from error
