"""Where the processes of a job wait for each other while they write a checkpoint in the background (io)."""

from __future__ import annotations

import itertools

import orbax.checkpoint as ocp

from sif_jax.parallel.distributed import gather_json

TIMEOUT_MS = 1_200_000  # as Orbax's own: what the slowest process may need for its part
NUMBERS = itertools.count()  # of the barriers that a process has made, which are the same on all


class GivenUpError(Exception):
    """Another process cannot write its part."""


class SaveBarrier:
    """Orbax's barrier, which can be given up: a process whose part failed never comes to it by itself.

    Every save passes the same number of barriers on all processes, so that their numbers say which is meant.
    """

    def __init__(self) -> None:
        self._wait = ocp.multihost.get_barrier_sync_fn()
        self._name, self._number, self._given_up = f"sif_jax_checkpoint_{next(NUMBERS)}", 0, False

    def __call__(self, *, key: str, timeout_ms: int) -> None:
        """
        Raises:
          GivenUpError: the others came to say that there will be no checkpoint.
        """
        self._number += 1
        self._wait(key=f"{self._name}_{self._number}", timeout_ms=timeout_ms)
        if self._given_up:
            raise GivenUpError

    def give_up(self, *, failed: bool) -> None:
        """All processes call it once they know that one has failed; those that have free the others."""
        self._given_up = True
        gather_json(None)  # all know it before one is freed, or that one would go on
        if failed:
            self._number += 1
            self._wait(key=f"{self._name}_{self._number}", timeout_ms=TIMEOUT_MS)
