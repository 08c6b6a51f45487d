"""Several processes as one job: where one fails, all end within seconds, each with the one reason (io).

A process that fails writes its reason into the key-value store of JAX's coordination service, which lives in process 0. A thread
of every process looks there twice a second and ends its process, since no exception reaches a main thread that waits inside
a collective. The thread also writes that its process lives; process 0 tells the others of one that has fallen silent.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
import traceback
from contextlib import suppress
from types import TracebackType
from typing import Any, NamedTuple

from jax.errors import JaxRuntimeError

from sif_jax.errors import InputError, PreemptedError
from sif_jax.parallel.distributed import coordination, heartbeat_timeout_s, start_processes

FAILURE, BEATS, HEARD, END = "sif_jax/failure", "sif_jax/beats", "sif_jax/heard", "sif_jax/end"
INTERVAL_S = 0.5
GRACE_S = 2  # for a main thread that is about to end with the same error itself
SETTLE_S = 5  # for the reason behind a collective that broke
LINGER_S = 20  # process 0 holds the store, so it waits until the others have heard, on busy hosts too
END_TIMEOUT_S = 60  # between the first process that is done and the last
BAD_INPUT, FAILED, INTERRUPTED = 2, 1, 130
FIX = "look at its own output and its host's log; the same command resumes the run"


class Failure(NamedTuple):
    process: int
    reason: str
    code: int  # that every process exits with

    def on(self, process: int) -> str:
        """The line that this process prints."""
        line = self.reason if process == self.process else f"process {self.process} failed: {self.reason}"
        return " ".join(line.split())


class Job:
    """`with Job(): …` joins the job that the environment describes, and ends it as a whole.

    A block that raises on one process ends this process and all others with one line each, nonzero, within seconds; a process
    that is killed or hangs ends the others when it has been silent for SIF_JAX_HEARTBEAT_TIMEOUT_S. What every
    process raises alike (`InputError.shared`, a preemption) leaves the block as usual. Of one process it does nothing.
    """

    def __enter__(self) -> None:
        start_processes()
        joined = coordination()
        self._watch = _Watch(*joined) if joined and joined[2] > 1 else None
        if self._watch:
            self._watch.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        if self._watch is None:
            return
        alike = isinstance(error, SystemExit | PreemptedError) or (isinstance(error, InputError) and error.shared)
        together = error is None or alike
        if not (together and self._watch.all_end()):
            self._watch.fail(error)


class _Store:
    """What the processes tell each other."""

    def __init__(self, client: Any, process: int) -> None:
        self._client, self._process, self._beats = client, process, 0

    def publish(self, failure: Failure) -> None:
        """The first failure stays; without process 0 there is nobody to tell."""
        with suppress(JaxRuntimeError):
            self._client.key_value_set(f"{FAILURE}/first", json.dumps(failure))

    def failure(self) -> Failure | None:
        found = self._client.key_value_dir_get(f"{FAILURE}/")
        return Failure(*json.loads(found[0][1])) if found else None

    def beat(self) -> None:
        self._beats += 1
        self._client.key_value_set(f"{BEATS}/{self._process}", str(self._beats), allow_overwrite=True)

    def beats(self) -> dict[int, str]:
        return self._by_process(BEATS)

    def hear(self) -> None:
        with suppress(JaxRuntimeError):
            self._client.key_value_set(f"{HEARD}/{self._process}", "", allow_overwrite=True)

    def heard(self) -> set[int]:
        return set(self._by_process(HEARD))

    def wait_for_all(self) -> bool:
        try:
            self._client.wait_at_barrier(END, int(END_TIMEOUT_S * 1000))
        except JaxRuntimeError:
            return False
        return True

    def _by_process(self, folder: str) -> dict[int, str]:
        return {int(key.rpartition("/")[2]): value for key, value in self._client.key_value_dir_get(f"{folder}/")}


class _Watch(threading.Thread):
    def __init__(self, client: Any, process: int, count: int) -> None:
        super().__init__(name="watch over the job", daemon=True)
        self._store, self._process, self._count = _Store(client, process), process, count
        self._silence = Silence(count, heartbeat_timeout_s(), now=time.monotonic())
        self._stopped, self._leaving = threading.Event(), threading.Lock()

    def run(self) -> None:
        try:
            while not self._stopped.wait(INTERVAL_S):
                self._look()
        except JaxRuntimeError:
            self._leave(_lost_first())

    def _look(self) -> None:
        self._store.beat()
        failure = self._store.failure()
        if failure is None and self._process == 0:
            failure = self._silence.failure(self._store.beats(), now=time.monotonic())
            if failure is not None:
                self._store.publish(failure)
        if failure is not None and not self._stopped.wait(GRACE_S):
            self._leave(failure)

    def all_end(self) -> bool:
        """Wait until every process has come to its end; False where one does not."""
        ended = self._store.wait_for_all()
        self._stopped.set()
        self.join(timeout=LINGER_S)
        return ended

    def fail(self, error: BaseException | None) -> None:
        """Tell all processes, and end this one."""
        failure = self._own_failure(error)
        self._stopped.set()
        self._store.publish(failure)
        self._leave(failure)

    def _own_failure(self, error: BaseException | None) -> Failure:
        if error is None:
            return Failure(self._process, f"not every process came to its end within {END_TIMEOUT_S} s", FAILED)
        if isinstance(error, InputError):
            return Failure(self._process, str(error), BAD_INPUT)
        if isinstance(error, KeyboardInterrupt):
            return Failure(self._process, "interrupted", INTERRUPTED)
        if isinstance(error, SystemExit):
            code = error.code if isinstance(error.code, int) and error.code else FAILED
            return Failure(self._process, f"stopped with exit code {code}, alone", code)
        return self._cause(error)

    def _cause(self, error: BaseException) -> Failure:
        """A collective breaks on every process when one is gone: the reason is then that one's. Meanwhile this one lives on."""
        own = f"{type(error).__name__}: {error}"
        try:
            before, until = self._store.beats(), time.monotonic() + SETTLE_S
            while time.monotonic() < until:
                if failure := self._store.failure():
                    return failure
                time.sleep(INTERVAL_S)
            after = self._store.beats()
        except JaxRuntimeError:
            return _lost_first()
        silent = [each for each in range(self._count) if each != self._process and before.get(each) == after.get(each)]
        if silent:
            return Failure(silent[0], f"it ended without a word; here that led to {own}; fix: {FIX}", FAILED)
        traceback.print_exception(error)
        return Failure(self._process, own, FAILED)

    def _leave(self, failure: Failure) -> None:
        """No more than one thread comes here, and it does not come back: what waits inside a collective cannot be woken."""
        self._leaving.acquire()
        print(f"error: {failure.on(self._process)}", file=sys.stderr)
        self._store.hear()
        if self._process == 0:
            self._linger({*range(self._count)} - {failure.process})
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(failure.code)

    def _linger(self, others: set[int]) -> None:
        until = time.monotonic() + LINGER_S
        with suppress(JaxRuntimeError):
            while not others <= self._store.heard() and time.monotonic() < until:
                time.sleep(INTERVAL_S / 5)


class Silence:
    """Which process has said nothing for too long (host)."""

    def __init__(self, count: int, timeout_s: int, *, now: float) -> None:
        self._timeout_s = timeout_s
        self._last: dict[int, tuple[str | None, float]] = {process: (None, now) for process in range(count)}

    def failure(self, beats: dict[int, str], *, now: float) -> Failure | None:
        for process, (before, since) in self._last.items():
            if beats.get(process) != before:
                self._last[process] = beats[process], now
            elif now - since > self._timeout_s:
                return Failure(
                    process, f"it ended without a word or hangs, silent for {self._timeout_s} s; fix: {FIX}", 1
                )
        return None


def _lost_first() -> Failure:
    return Failure(
        0, f"it ended without a word, and with it the service at which the processes meet; fix: {FIX}", FAILED
    )
