"""How long a program takes at least: the largest of three times, each at the data sheet's full rate (pure).

No overlap is lost, no link idles, no unit waits: a lower bound. The bytes between devices are taken to leave a chip over all of
its links at once, which a collective along one axis of the mesh does not do.
"""

from __future__ import annotations

from typing import NamedTuple

from sif_jax.parallel.chips import Chip
from sif_jax.plan.collectives import total_bytes
from sif_jax.plan.compiled import Compiled, Cost

RESOURCES: tuple[str, ...] = ("compute", "memory", "network")


class Times(NamedTuple):
    """Seconds."""

    compute: float
    memory: float
    network: float

    @property
    def bound(self) -> float:
        return max(self)

    @property
    def bound_by(self) -> str:
        return RESOURCES[self.index(max(self))]


def times(cost: Cost, chip: Chip) -> Times:
    """Of one run of a program."""
    return Times(
        cost.flops / chip.flops,
        cost.memory_bytes / chip.hbm_bandwidth,
        total_bytes(cost.collectives) / chip.link_bandwidth,
    )


class StepTime(NamedTuple):
    seconds: float
    shares: dict[str, float]  # seconds by what bounds the program that spends them

    @property
    def bound_by(self) -> str:
        return max(self.shares, key=lambda resource: self.shares[resource])


def step_time(programs: list[Compiled], chip: Chip) -> StepTime | None:
    """Of one optimizer step: the programs one after the other. None: one of them did not fit."""
    shares = dict.fromkeys(RESOURCES, 0.0)
    for each in programs:
        if each.cost is None:
            return None
        bound = times(each.cost, chip)
        shares[bound.bound_by] += bound.bound * each.program.calls
    return StepTime(sum(shares.values()), shares)
