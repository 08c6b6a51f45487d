"""What the processes of a GRPO run tell each other: prompts, judgements and scores, exact to the bit (io)."""

from __future__ import annotations

import dataclasses
import io
from collections import Counter
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jaxtyping import Float, Int

from sif_jax.parallel.distributed import gather_bytes, gather_json
from sif_jax.parallel.placement import Shard
from sif_jax.rewards.scoring import Scores


def together_ids(records: Sequence[tuple[int, ...]], shard: Shard) -> Int[np.ndarray, " P"]:
    """The record of every prompt of the step, from the rows that each process loaded."""
    own = [index for (index,) in records]
    if shard.count == 1:
        return np.array(own)
    by_shard = {index: ids for index, ids in gather_json((shard.index, own))}  # processes may hold the same rows
    return np.array([index for part in range(shard.count) for index in by_shard[part]])


def own_run(count: int) -> slice:
    """The completions that this process judges: equal runs, the first ones longer where they do not divide."""
    runs = np.array_split(np.arange(count), jax.process_count())
    ends = np.cumsum([len(run) for run in runs])
    index = jax.process_index()
    return slice(int(ends[index] - len(runs[index])), int(ends[index]))


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
