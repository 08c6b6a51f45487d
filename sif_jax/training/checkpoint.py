"""Checkpoints of a run: named arrays and a JSON object per step, whole or not at all (io)."""

from __future__ import annotations

import errno
import logging
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from sif_jax.errors import InputError

PARTIAL = "*.orbax-checkpoint-tmp*"


class Checkpoints:
    """The newest `keep` checkpoints in a directory.

    Any pytree of arrays is saved as a flat mapping from its leaves' paths, so an nnx.State, an optax state and a dict
    are the same to it. `save` returns when the checkpoint is on disk; a kill before that leaves the previous ones.
    """

    def __init__(self, directory: str | Path, keep: int) -> None:
        self.directory = Path(directory).absolute()
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, enable_async_checkpointing=False, cleanup_tmp_directories=True
        )
        handlers = {"arrays": ocp.PyTreeCheckpointHandler(), "host": ocp.JsonCheckpointHandler()}
        with _disk_problems(self.directory):
            self._manager = ocp.CheckpointManager(self.directory, options=options, item_handlers=handlers)

    def latest(self) -> int | None:
        return self._manager.latest_step()

    def save(self, step: int, *, arrays: Any, host: Mapping[str, Any]) -> None:
        """
        Raises:
          InputError: the disk is full or read-only; the previous checkpoints are intact.
        """
        flat = _flat(arrays)
        items = ocp.args.Composite(arrays=ocp.args.PyTreeSave(flat), host=ocp.args.JsonSave(dict(host)))
        with _disk_problems(self.directory):
            if shutil.disk_usage(self.directory).free < sum(leaf.nbytes for leaf in flat.values()):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self._manager.save(step, args=items, force=True)

    def restore(self, step: int | None, arrays_like: Any, *, partial: bool = False) -> tuple[int, Any, dict[str, Any]]:
        """(step, arrays, host) of one step, or of the latest; arrays take the sharding of `arrays_like`.

        `partial` reads those arrays alone and leaves the others of the checkpoint on disk.

        Raises:
          InputError: no such checkpoint, an unreadable one, or one of another model (the tensor is named).
        """
        step = self._existing(step)
        like = {name: _abstract(leaf) for name, leaf in _flat(arrays_like).items()}
        with _damage(self.directory / str(step)):
            saved = self._saved(step)
            wanted = {name: saved[name] for name in saved if name in like or not partial}
            _check_same_tensors(wanted, like, self.directory / str(step))
            arguments = ocp.checkpoint_utils.construct_restore_args(like)
            arrays = ocp.args.PyTreeRestore(item=like, restore_args=arguments, partial_restore=partial)
            items = ocp.args.Composite(arrays=arrays, host=ocp.args.JsonRestore())
            restored = self._manager.restore(step, args=items)
        leaves = [restored["arrays"][name] for name in like]
        return step, jax.tree.unflatten(jax.tree.structure(arrays_like), leaves), restored["host"]

    def close(self) -> None:
        self._manager.close()

    def _saved(self, step: int) -> Mapping[str, Any]:
        metadata = self._manager.item_metadata(step).get("arrays")
        if metadata is None:
            raise FileNotFoundError(self.directory / str(step) / "arrays")
        return metadata.tree

    def _existing(self, step: int | None) -> int:
        steps = sorted(self._manager.all_steps())
        if not steps or (step is not None and step not in steps):
            raise InputError(
                "no such checkpoint", file=self.directory, value=step, expected=f"one of the saved steps {steps}"
            )
        return steps[-1] if step is None else step


def _flat(tree: Any) -> dict[str, Any]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def _abstract(leaf: Any) -> Any:
    """NumPy leaves stay NumPy; others come back as jax arrays, on the first device unless a sharding says where."""
    if isinstance(leaf, np.ndarray):
        return leaf
    sharding = leaf.sharding or jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _check_same_tensors(saved: Mapping[str, Any], like: Mapping[str, Any], file: Path) -> None:
    fix = "resume with the config that wrote this checkpoint, or start a new run.name"
    for name in sorted(saved.keys() ^ like.keys()):
        problem = "not in this model" if name in saved else "not in this checkpoint"
        raise InputError(f"the tensor {name} is {problem}", file=file, fix=fix)
    for name, leaf in like.items():
        met, expected = (f"{x.dtype}{list(x.shape)}" for x in (saved[name], leaf))
        if met != expected:
            raise InputError(f"the tensor {name} differs", file=file, value=met, expected=expected, fix=fix)


@contextmanager
def _disk_problems(directory: Path) -> Iterator[None]:
    """A refused write is one InputError, and its remains are removed. TensorStore tells the errno in words only."""
    try:
        with _quiet():
            yield
    except (OSError, ValueError) as error:
        code = re.search(r"os_error_code='(\d+)'", str(error))
        reason = error.strerror if isinstance(error, OSError) else code and os.strerror(int(code[1]))
        if not reason:
            raise
        logging.getLogger("asyncio").setLevel(logging.CRITICAL)  # the tasks that Orbax leaves behind would log it again
        for partial in directory.glob(PARTIAL):
            shutil.rmtree(partial, ignore_errors=True)
        raise InputError(
            f"cannot write a checkpoint ({reason}); the earlier ones are intact",
            file=directory,
            fix="free space or make it writable, or set run.root to another disk; then run the same command to resume",
        ) from error


@contextmanager
def _damage(checkpoint: Path) -> Iterator[None]:
    try:
        with _quiet():
            yield
    except InputError:
        raise
    except (OSError, ValueError) as error:
        raise InputError(
            "this checkpoint is damaged", file=checkpoint, fix="delete its directory to resume from the one before"
        ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Orbax logs each failed write with its traceback; the InputError says it once."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)
