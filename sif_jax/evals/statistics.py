"""Means over held-out questions with bootstrap intervals over scenes (host).

Questions about one scene share its image, so they are not independent: the bootstrap draws scenes, not questions.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int, Shaped

from sif_jax.errors import InputError

DRAWS_AT_ONCE = 4_000_000  # resamples x clusters held in memory: 32 MB


@dataclass(frozen=True)
class Interval:
    mean: float
    low: float
    high: float
    questions: int
    scenes: int


@dataclass(frozen=True)
class Summary:
    """Per metric of `METRICS`, and per family and metric; a metric that no question measures is absent."""

    questions: int
    scenes: int
    metrics: Mapping[str, Interval]
    families: Mapping[str, Mapping[str, Interval]]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> Summary:
        families = {family: _intervals(metrics) for family, metrics in row["families"].items()}
        return cls(row["questions"], row["scenes"], _intervals(row["metrics"]), families)


def _intervals(metrics: Mapping[str, Any]) -> dict[str, Interval]:
    return {name: Interval(**fields) for name, fields in metrics.items()}


# Where each metric stands in a sample; null there means that the question does not measure it.
METRICS: Mapping[str, tuple[str, ...]] = {
    "format_rate": ("scores", "format"),
    "answer_accuracy": ("judge",),
    "hiou_last": ("scores", "hiou_last"),
    "hiou_gain": ("scores", "hiou_gain"),
    "depth_consistency": ("scores", "depth_consistency"),
    "total_reward": ("scores", "total"),
}


def bootstrap_interval(
    values: Float[np.ndarray, " question"] | Sequence[float],
    clusters: Shaped[np.ndarray, " question"] | Sequence[Any],
    *,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int,
) -> Interval:
    """Mean of the values and the percentile-bootstrap interval of that mean when whole clusters are drawn.

    Raises:
      InputError: no values, a value that is not finite, or another number of clusters than of values.
    """
    scores = np.asarray(values, np.float64)
    if scores.size == 0:
        raise InputError("no values to average", expected="at least one question")
    if not np.isfinite(scores).all():
        raise InputError("a value is not finite", value=scores[~np.isfinite(scores)][0], expected="finite numbers")
    if len(clusters) != len(scores):
        raise InputError("clusters and values differ in number", value=len(clusters), expected=f"{len(scores)}")

    cluster, index = np.unique(np.asarray(clusters), return_inverse=True)
    sums, sizes = np.bincount(index, scores), np.bincount(index)
    draws = _cluster_draws(len(cluster), resamples, np.random.default_rng(seed))
    means = np.concatenate([(draw @ sums) / (draw @ sizes) for draw in draws])
    tail = (1 - confidence) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return Interval(float(scores.mean()), float(low), float(high), scores.size, len(cluster))


def _cluster_draws(
    num_clusters: int, resamples: int, rng: np.random.Generator
) -> Iterator[Int[np.ndarray, "resample cluster"]]:
    """Blocks [resample, cluster] of how often each resample drew each cluster."""
    block = max(1, DRAWS_AT_ONCE // num_clusters)
    for start in range(0, resamples, block):
        size = min(block, resamples - start)
        yield rng.multinomial(num_clusters, np.full(num_clusters, 1 / num_clusters), size)


def summarise(samples: Sequence[Mapping[str, Any]], *, seed: int = 0) -> Summary:
    """Every metric over all samples and per family, families in alphabetical order."""
    families = sorted({sample["family"] for sample in samples})
    return Summary(
        questions=len(samples),
        scenes=len({sample["scene"] for sample in samples}),
        metrics=_summarise_group(samples, seed),
        families={name: _summarise_group([s for s in samples if s["family"] == name], seed) for name in families},
    )


def _summarise_group(samples: Sequence[Mapping[str, Any]], seed: int) -> dict[str, Interval]:
    if not samples:
        raise InputError("no samples to summarise", expected="at least one answered question")
    intervals = {}
    for name, path in METRICS.items():
        measured = [(value, sample["scene"]) for sample in samples if (value := _at(sample, path)) is not None]
        if measured:
            values, scenes = zip(*measured)
            intervals[name] = bootstrap_interval(values, scenes, seed=seed)
    return intervals


def _at(sample: Mapping[str, Any], path: tuple[str, ...]) -> float | None:
    found: Any = sample
    for key in path:
        found = found[key]
    return None if found is None else float(found)
