"""Told to end: SIGTERM is noticed where a run can be saved, on all processes at the same place (io)."""

from __future__ import annotations

import itertools
import signal
import threading
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import jax
from jax.experimental.multihost_utils import reached_preemption_sync_point

from sif_jax.errors import PreemptedError

CHECKS = itertools.count(1)  # of this process, the same on all; JAX compares them


class Preemption:
    """While it is open, SIGTERM does not end the process: the next `check` raises.

    A job of several processes, one of which gets the signal, agrees on the check at which all of them raise; so all make the
    same checks in the same order. Every further SIGTERM changes nothing. JAX's own notice of it (jax.distributed) takes up
    to a second to arrive.
    """

    def __init__(self, directory: Path) -> None:
        self._directory, self._signalled = directory, False
        self._before: Any = None

    def __enter__(self) -> Preemption:
        jax_catches_it = jax.distributed.is_initialized()
        if not jax_catches_it and threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._notice)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)

    def check(self, step: int) -> None:
        """
        Raises:
          PreemptedError: the run is to be saved as it was before this step, and to end.
        """
        if self._noticed():
            raise PreemptedError(
                f"preempted (SIGTERM): {self._directory} is saved before step {step}; run the same command to resume"
            )

    def _noticed(self) -> bool:
        if jax.distributed.is_initialized():
            return reached_preemption_sync_point(next(CHECKS))
        return self._signalled

    def _notice(self, number: int, frame: FrameType | None) -> None:
        self._signalled = True
