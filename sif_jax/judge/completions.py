"""Judge whole completions: the answer that each trace ends with, against the record's (host)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float64

from sif_jax.errors import InputError
from sif_jax.judge.rule import rule_score
from sif_jax.sif.grammar import parse
from sif_jax.sif.record import Record


class Judged(NamedTuple):
    scores: Float64[np.ndarray, " completion"]  # in [0, 1]; NaN: the judgement failed
    counters: dict[str, float]  # by metric name, since the run began


class JudgeStoppedError(InputError):
    """Judging cannot go on: save the state of the run as it was before this rollout, then raise on."""


@runtime_checkable
class Judge(Protocol):
    def submit(self, completions: Sequence[str], records: Sequence[Record], image_root: Path) -> Future[Judged]:
        """Start judging and return at once; the result may raise JudgeStoppedError."""
        ...

    def state(self) -> dict[str, Any]:
        """What a resumed run counts on from, as JSON."""
        ...

    def set_state(self, state: Mapping[str, Any]) -> None: ...

    def close(self) -> None: ...


class RuleJudge:
    """Scores by rules; never fails, spends nothing and keeps no state."""

    def submit(self, completions: Sequence[str], records: Sequence[Record], image_root: Path) -> Future[Judged]:
        judged: Future[Judged] = Future()
        judged.set_result(Judged(judge_completions(completions, records), {}))
        return judged

    def state(self) -> dict[str, Any]:
        return {}

    def set_state(self, state: Mapping[str, Any]) -> None:
        pass

    def close(self) -> None:
        pass


def judge_completions(completions: Sequence[str], records: Sequence[Record]) -> Float64[np.ndarray, " completion"]:
    """The rule judge's score in [0, 1] of each completion; 0 where there is no answer."""
    return np.array(
        [
            rule_score(record.problem, record.response, parse(completion).answer or "")
            for completion, record in zip(completions, records, strict=True)
        ],
        np.float64,
    )
