"""Checkpoints of a run: named arrays and a JSON object per step, whole or not at all, written while training goes on (io)."""

from __future__ import annotations

import errno
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from sif_jax.config import KeepBestConfig
from sif_jax.errors import InputError
from sif_jax.parallel.distributed import gather_json, is_first, raise_together
from sif_jax.training.checksums import check_files, damaged, write_checksums
from sif_jax.training.retention import kept
from sif_jax.training.save_barrier import GivenUpError, SaveBarrier

TMP = ".orbax-checkpoint-tmp"
ARRAYS, HOST = "arrays", "host"
POLL_S = 0.1
log = logging.getLogger(__name__)


class Checkpoints:
    """The newest `keep` checkpoints in a directory, and the `best` ones by the score that each is saved with.

    Any pytree of arrays is saved as a flat mapping from its leaves' paths, so an nnx.State, an optax state and a dict
    are the same to it. `save` returns when the arrays are copied from the devices; the files are written in the background,
    and a kill before they are complete leaves the previous checkpoints. Of several processes, all make every call.

    As a context it ends with `finish`; left by an error, it lets the write end and tells of a failure in the log.

    Raises:
      InputError: the directory cannot be made.
    """

    def __init__(self, directory: str | Path, keep: int, best: KeepBestConfig | None = None) -> None:
        self.directory = Path(directory).absolute()
        self._keep, self._best, self._barrier = keep, best, SaveBarrier()
        self._scores = self._open()
        self._saver = ocp.AsyncCheckpointer(
            ocp.CompositeCheckpointHandler(
                **{ARRAYS: ocp.PyTreeCheckpointHandler(), HOST: ocp.JsonCheckpointHandler()}
            ),
            async_options=ocp.options.AsyncOptions(
                barrier_sync_fn=self._barrier, post_finalization_callback=self._seal
            ),
        )
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._saving: tuple[int, Future[None]] | None = None

    def latest(self) -> int | None:
        """The newest step, even if it is still being written."""
        return max(self._scores, default=None)

    def save(self, step: int, *, arrays: Any, host: Mapping[str, Any], score: float | None = None) -> None:
        """Start to write; what failed in the background before is told first. A step that was saved is left as it is.

        Raises:
          InputError: on every process, where one finds the disk full or read-only; the previous checkpoints are intact.
        """
        self.finish()
        if step in self._scores:
            return
        flat = _flat(arrays)
        self._together(lambda: self._check_disk(step, sum(leaf.nbytes for leaf in flat.values())))
        items = {
            ARRAYS: ocp.args.PyTreeSave(flat),
            HOST: ocp.args.JsonSave({"host": dict(host), "score": score}),
        }
        with self._no_remains(), self._disk_problems():
            self._saver.save(self.directory / str(step), args=ocp.args.Composite(**items))
        self._scores[step] = score
        dropped = self._scores.keys() - kept(self._scores, self._keep, self._best)
        self._scores = {step: score for step, score in self._scores.items() if step not in dropped}
        self._saving = step, self._thread.submit(self._commit, sorted(dropped))

    def finish(self) -> None:
        """Return when what is being written is on disk.

        Raises:
          InputError: on every process, where one could not write; the previous checkpoints are intact.
        """
        if self._saving is None:
            return
        (step, saving), self._saving = self._saving, None
        _wait_together(saving)
        failed = saving.done() and saving.exception() is not None
        if any(gather_json(failed)):
            self._barrier.give_up(failed=failed)
            self._scores.pop(step)
        self._together(saving.result)

    def resume(self, arrays: Any) -> tuple[int, Any, dict[str, Any] | None]:
        """(step, arrays, host) of the newest; where there is none, step 0 with `arrays` as they are, and no host.

        Raises:
          InputError: as `restore`.
        """
        return (0, arrays, None) if self.latest() is None else self.restore(None, arrays)

    def restore(self, step: int | None, arrays_like: Any, *, partial: bool = False) -> tuple[int, Any, dict[str, Any]]:
        """(step, arrays, host) of one step, or of the latest; arrays take the sharding of `arrays_like`.

        `partial` reads those arrays alone and leaves the others of the checkpoint on disk.

        Raises:
          InputError: on every process: no such checkpoint, a damaged one (the file is named), or one of another model (the
            tensor is named).
        """
        self.finish()
        step = self._existing(step)
        checkpoint = self.directory / str(step)
        check_files(checkpoint)
        like = {name: _abstract(leaf) for name, leaf in _flat(arrays_like).items()}
        arrays, host, problem = {}, {}, None
        try:
            with _damage(checkpoint):
                arrays, host = _read_arrays(checkpoint / ARRAYS, like, partial=partial), _read_host(checkpoint)
        except InputError as error:
            problem = error
        raise_together(problem)
        leaves = [arrays[name] for name in like]
        return step, jax.tree.unflatten(jax.tree.structure(arrays_like), leaves), host["host"]

    def close(self) -> None:
        try:
            self.finish()
        finally:
            self._thread.shutdown(wait=False)
            self._saver.close()

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
        elif self._saving is not None:
            problem = self._saving[1].exception()  # not together: the others may be elsewhere
            if problem is not None:
                log.error("the checkpoint of step %d was not written: %s", self._saving[0], problem)

    def _open(self) -> dict[int, float | None]:
        """What is there, as the first process sees it; remains of saves and deletions that were cut are removed."""

        def prepare() -> None:
            if is_first():
                self.directory.mkdir(parents=True, exist_ok=True)
                self._remove_partial()

        self._together(prepare)
        found = [[int(path.name), _score(path)] for path in self.directory.glob("[0-9]*") if path.name.isdigit()]
        return {int(step): score for step, score in gather_json(sorted(found))[0]}

    def _commit(self, dropped: list[int]) -> None:
        """In the background: a checkpoint is dropped once the new one is on disk."""
        with _quiet():
            self._saver.wait_until_finished()
        for step in dropped if is_first() else []:
            doomed = self.directory / f"{step}{TMP}-dropped"  # a kill in the middle must not leave half a checkpoint
            with suppress(OSError):  # what stays is too much, not wrong
                (self.directory / str(step)).rename(doomed)
            shutil.rmtree(doomed, ignore_errors=True)

    def _seal(self) -> None:
        """In the background of the first process, before the directory gets its name."""
        for partial in self.directory.glob(f"*{TMP}*"):
            if not partial.name.endswith("-dropped"):
                write_checksums(partial)

    def _check_disk(self, step: int, num_bytes: int) -> None:
        if shutil.disk_usage(self.directory).free < num_bytes:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        probe = self.directory / f"{step}{TMP}-probe-{jax.process_index()}"
        probe.touch()
        probe.unlink()

    def _together(self, action: Callable[[], None]) -> None:
        problem = None
        try:
            with self._disk_problems():
                action()
        except GivenUpError:
            pass  # another process has the reason
        except InputError as error:
            problem = error
        with self._no_remains():  # once no process writes any more: another would fail for want of what is removed
            raise_together(problem)

    def _existing(self, step: int | None) -> int:
        steps = sorted(self._scores)
        if not steps or (step is not None and step not in steps):
            raise InputError(
                "no such checkpoint", file=self.directory, value=step, expected=f"one of the saved steps {steps}"
            )
        return steps[-1] if step is None else step

    def _remove_partial(self) -> None:
        for partial in self.directory.glob(f"*{TMP}*"):
            if partial.is_dir():
                shutil.rmtree(partial, ignore_errors=True)
            else:
                partial.unlink(missing_ok=True)

    @contextmanager
    def _no_remains(self) -> Iterator[None]:
        try:
            yield
        except InputError:
            self._remove_partial()
            raise

    @contextmanager
    def _disk_problems(self) -> Iterator[None]:
        """A refused write is one InputError. TensorStore tells the errno in words only."""
        try:
            with _quiet():
                yield
        except (OSError, ValueError) as error:
            code = re.search(r"os_error_code='(\d+)'", str(error))
            reason = error.strerror if isinstance(error, OSError) else code and os.strerror(int(code[1]))
            if not reason:
                raise
            logging.getLogger("asyncio").setLevel(logging.CRITICAL)  # the tasks that Orbax leaves would log it again
            raise InputError(
                f"cannot write a checkpoint ({reason}); the earlier ones are intact",
                file=self.directory,
                fix="free space or make it writable, or set run.root to another disk; then run the same command to resume",
            ) from error


def _wait_together(saving: Future[None]) -> None:
    """Until all processes are done, or one has failed: then the others may wait for it in vain."""
    while True:
        wait([saving], timeout=POLL_S)
        states = gather_json([saving.done(), saving.done() and saving.exception() is not None])
        if all(done for done, _ in states) or any(failed for _, failed in states):
            return


def _read_arrays(directory: Path, like: Mapping[str, Any], *, partial: bool) -> Mapping[str, Any]:
    handler, place = ocp.PyTreeCheckpointHandler(), epath.Path(directory)
    saved = handler.metadata(place).tree
    wanted = {name: saved[name] for name in saved if name in like or not partial}
    _check_same_tensors(wanted, like, directory.parent)
    arguments = ocp.checkpoint_utils.construct_restore_args(dict(like))
    arguments = ocp.args.PyTreeRestore(item=dict(like), restore_args=arguments, partial_restore=partial)
    return handler.restore(place, args=arguments)


def _read_host(checkpoint: Path) -> dict[str, Any]:
    return ocp.JsonCheckpointHandler().restore(epath.Path(checkpoint / HOST))  # pyright: ignore[reportReturnType]


def _score(checkpoint: Path) -> float | None:
    """None also where the file is damaged, which a restore will tell."""
    try:
        return _read_host(checkpoint)["score"]
    except (OSError, ValueError, LookupError, TypeError):
        return None


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
def _damage(checkpoint: Path) -> Iterator[None]:
    try:
        with _quiet():
            yield
    except InputError:
        raise
    except (OSError, ValueError) as error:
        raise damaged(checkpoint, checkpoint, "it cannot be read") from error


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
