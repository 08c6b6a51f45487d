"""Judge whole completions: the answer that the trace ends with, against the record's (host)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float64

from sif_jax.judge.rule import rule_score
from sif_jax.sif.grammar import parse
from sif_jax.sif.record import Record


def judge_completions(completions: Sequence[str], records: Sequence[Record]) -> Float64[np.ndarray, " completion"]:
    """The rule judge's score in [0, 1] of each completion; 0 where there is no answer."""
    return np.array(
        [
            rule_score(record.problem, record.response, parse(completion).answer or "")
            for completion, record in zip(completions, records, strict=True)
        ]
    )
