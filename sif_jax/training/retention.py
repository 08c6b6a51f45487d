"""Which checkpoints of a run are kept (host)."""

from __future__ import annotations

from collections.abc import Mapping

from sif_jax.config import KeepBestConfig


def kept(scores: Mapping[int, float | None], newest: int, best: KeepBestConfig | None) -> set[int]:
    """The steps to keep: the `newest` ones, and beside them the best by score; of equal ones the later.

    A step without a score is never among the best.
    """
    steps = set(sorted(scores)[-newest:])
    if best is None:
        return steps
    sign = 1 if best.mode == "max" else -1
    ranked = sorted((sign * score, step) for step, score in scores.items() if score is not None)
    return steps | {step for _, step in ranked[-best.count :]}


class MeanScore:
    """The mean of the metric that ranks checkpoints, over the logged steps since the last one.

    One step's value of a training metric says little about the weights; the mean says more. Its state is in the checkpoint,
    so that a save at a preemption splits no mean.
    """

    def __init__(self, best: KeepBestConfig | None) -> None:
        self._metric = best and best.metric
        self._sum, self._count = 0.0, 0

    def add(self, metrics: Mapping[str, float]) -> None:
        if self._metric is not None and self._metric in metrics:
            self._sum, self._count = self._sum + metrics[self._metric], self._count + 1

    @property
    def value(self) -> float | None:
        """None where nothing was measured."""
        return self._sum / self._count if self._count else None

    def take(self) -> float | None:
        """The value; what follows is the next mean."""
        value, self._sum, self._count = self.value, 0.0, 0
        return value

    def get_state(self) -> dict[str, float]:
        return {"sum": self._sum, "count": self._count}

    def set_state(self, state: Mapping[str, float]) -> None:
        self._sum, self._count = float(state["sum"]), int(state["count"])
