"""An engine of a bench in a process of its own: its memory, its compilation cache and its libraries are not the other's (io)."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

from sif_jax.errors import InputError

Answer = TypeVar("Answer")


class Stepped(NamedTuple):
    loss: float
    grad_norm: float


class Timed(NamedTuple):
    seconds: float
    step: Stepped


class Engine(Protocol):
    def step(self) -> Stepped:
        """One step, done when it returns."""
        ...

    def figures(self) -> dict[str, Any]:
        """What the engine says of itself, its peak memory among it."""
        ...


class Worker:
    """A new process that does what it is asked, and is gone when the context is left.

    The parent never touches a device, so that a GPU's memory is the engines' alone.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._pool = ProcessPoolExecutor(max_workers=1, mp_context=get_context("spawn"))

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *error: object) -> None:
        self._pool.shutdown()

    def run(self, function: Callable[..., Answer], *arguments: Any) -> Answer:
        """
        Raises:
          InputError: the function's own, or its process died.
        """
        try:
            return self._pool.submit(function, *arguments).result()
        except BrokenProcessPool:
            raise InputError(
                f"the process of {self._name} died",
                expected="enough memory, most often",
                fix="see what it said above; use a smaller batch, or remat",
            ) from None

    def open(
        self, make: Callable[..., Engine], *arguments: Any, cache: Path | None = None, alone: bool = False
    ) -> Worker:
        """Keep `make(*arguments)` there as its engine.

        `cache` is JAX's directory of compiled programs; `alone`: no other engine is on the device, whose memory JAX may then
        take at its start, as it does in training.
        """
        self.run(_open, cache, alone, make, arguments)
        return self

    def forget_programs(self) -> Worker:
        """As in a new process, the next step traces and compiles again, with what the cache's directory holds."""
        self.run(_forget_programs)
        return self

    def step(self) -> Timed:
        return self.run(_timed_step)

    def figures(self) -> dict[str, Any]:
        return self.run(_figures)


_engines: list[Engine] = []  # of this process: one


def _open(cache: Path | None, alone: bool, make: Callable[..., Engine], arguments: tuple[Any, ...]) -> None:
    if not alone:
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    if cache is not None:
        import jax

        jax.config.update("jax_compilation_cache_dir", str(cache))
    _engines.append(make(*arguments))


def _timed_step() -> Timed:
    began = time.perf_counter()
    step = _engines[0].step()
    return Timed(time.perf_counter() - began, step)


def _forget_programs() -> None:
    import jax

    jax.clear_caches()


def _figures() -> dict[str, Any]:
    return _engines[0].figures()
