"""What the processes of a GRPO run tell each other: judgements and scores, exact to the bit (io)."""

from __future__ import annotations

import dataclasses
import io
from collections import Counter
from collections.abc import Mapping

import jax
import numpy as np
from jaxtyping import Float

from sif_jax.parallel.distributed import gather_bytes, gather_json
from sif_jax.rewards.scoring import Scores


def gather_judgements(
    judged: Float[np.ndarray, " completion"], scores: Scores, counters: Mapping[str, float]
) -> tuple[Float[np.ndarray, " all_completions"], Scores, Mapping[str, float]]:
    """Those of all completions, in order, on every process; counters add up."""
    if jax.process_count() == 1:
        return judged, scores, counters
    everyone = [_unpacked(data) for data in gather_bytes(_packed({"judged": judged} | _fields(scores)))]
    areas = max(each["hious"].shape[1] for each in everyone)
    for each in everyone:
        each["hious"] = np.pad(each["hious"], ((0, 0), (0, areas - each["hious"].shape[1])))
    joined = {name: np.concatenate([each[name] for each in everyone]) for name in everyone[0]}
    total: Counter[str] = Counter()
    for each in gather_json(dict(counters)):
        total.update(each)
    return joined.pop("judged"), Scores(**joined), dict(total)


def _fields(scores: Scores) -> dict[str, np.ndarray]:
    return {field.name: getattr(scores, field.name) for field in dataclasses.fields(scores)}


def _packed(arrays: Mapping[str, np.ndarray]) -> bytes:
    file = io.BytesIO()
    np.savez(file, **arrays)  # pyright: ignore[reportArgumentType]
    return file.getvalue()


def _unpacked(data: bytes) -> dict[str, np.ndarray]:
    with np.load(io.BytesIO(data), allow_pickle=False) as file:
        return dict(file)
