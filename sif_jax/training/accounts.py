"""The judge's account over several processes: a checkpoint holds the sum, each process its share of sum and caps (io)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax

from sif_jax.config import JudgeConfig
from sif_jax.judge import Judge
from sif_jax.parallel.distributed import gather_json


def share_of_caps(config: JudgeConfig) -> JudgeConfig:
    """A process may spend an equal part of what the run may."""
    count = jax.process_count()
    if count == 1:
        return config
    cost, tokens = config.max_cost, config.max_total_tokens
    return config.model_copy(
        update={"max_cost": cost and cost / count, "max_total_tokens": tokens and max(tokens // count, 1)}
    )


def whole_account(judge: Judge) -> dict[str, Any]:
    """What the run's checkpoint says, whatever the number of processes; all call it."""
    first, *others = gather_json(judge.state()) if jax.process_count() > 1 else [judge.state()]
    for other in others:
        first = _sum(first, other)
    return first


def share_of_account(state: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse: parts that add up to the state."""
    return _part(state, jax.process_index(), jax.process_count())


def _sum(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    def added(name: str) -> Any:
        values = [each[name] for each in (one, other) if name in each]
        return _sum(*values) if len(values) == 2 and isinstance(values[0], Mapping) else sum(values[1:], values[0])

    return {name: added(name) for name in [*one, *(name for name in other if name not in one)]}


def _part(state: Mapping[str, Any], index: int, count: int) -> dict[str, Any]:
    def part(value: Any) -> Any:
        if isinstance(value, Mapping):
            return _part(value, index, count)
        return value // count + (index < value % count) if isinstance(value, int) else value / count

    return {name: part(value) for name, value in state.items()}
