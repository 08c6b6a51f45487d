"""Sample completions of prompts: each prompt computed and held once, rows refilled as they end (io).

    prompts → prefill → pool of keys and values ┐
    waiting samples → rows ─────────────────────┴→ decode, some steps on the device → ended samples leave, the next take over

`stream` decodes any number of prompts as they come; `generate` is one batch of prompts as arrays. Between two calls nothing of
a rollout stays on the device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key, Shaped, UInt32

from sif_jax.errors import InputError
from sif_jax.models.qwen2_5_vl.config import TextConfig
from sif_jax.models.qwen2_5_vl.layer_arrays import AnyState, are_apart, merge_model, separate_layers
from sif_jax.models.qwen2_5_vl.model import Qwen2_5_VL
from sif_jax.parallel.partition import num_shards
from sif_jax.parallel.placement import split_by_prompts
from sif_jax.rollout import programs
from sif_jax.rollout.programs import Pool, Spread, encode_images, next_positions
from sif_jax.rollout.sampling import Sampling
from sif_jax.rollout.schedule import Schedule, Slots, Task, Usage, ring_lengths
from sif_jax.rollout.stops import Decode, first_stop

__all__ = ["Prompts", "Rollout", "encode_images", "generate", "next_positions", "stream"]

FIRST_RING = 64  # tokens
MAX_STEPS = 32  # between two words with the host
MAX_STEPS_WITH_STRINGS = 8  # what runs on after a stop string is thrown away


AnyBatch = Mapping[str, Any]  # the batch contract, on the host or on devices


class Prompts(NamedTuple):
    """Prompts that are computed in one pass, one per row of a batch."""

    batch: AnyBatch
    features: Shaped[Array, "F I D"]
    numbers: Int[np.ndarray, "F"]  # what the caller knows them by; -1 is a row of padding
    keys: UInt32[np.ndarray, "F M word"]
    limits: Int[np.ndarray, "F M"]  # tokens of each completion at most


class Rollout(NamedTuple):
    """Completions of P prompts × M samples; the token that stops a sample is its last one."""

    ids: Int[Array, "P M T"]  # pad_id after the end
    logprobs: Float[Array, "P M T"]  # 0 after the end
    lengths: Int[Array, "P M"]  # number of tokens, the stop token included
    finished: Bool[Array, "P M"]  # False: cut at max_new_tokens


def generate(
    graphdef: nnx.GraphDef,
    states: tuple[AnyState, ...],
    batch: AnyBatch,
    features: Shaped[Array, "P I D"],
    keys: Key[Array, "P M"],
    *,
    sampling: Sampling,
    pad_id: int,
    by_prompts: bool | None = None,
    rows: int | None = None,
    prefill: int | None = None,
    limits: Int[np.ndarray, "P M"] | None = None,
    decode_text: Decode | None = None,
    usage: Usage | None = None,
    separate: bool | None = None,
    between: Callable[[], None] | None = None,
) -> Rollout:
    """Continue each prompt of a batch (one prompt per row, padded on the right) M times.

    At most `rows` completions are decoded at once (all, if None), and `prefill` prompts computed in one pass. On a mesh the
    lanes share out the prompts, or the samples of every prompt (`by_prompts`; None: samples where prompts are too few). Every
    process returns the whole rollout.

    Raises:
      InputError: neither prompts nor samples divide over the lanes, or stop strings without `decode_text`.
    """
    (prompts, samples), mesh = keys.shape, jax.sharding.get_abstract_mesh()
    lanes = num_shards(mesh, "batch")
    if by_prompts is None:
        by_prompts = split_by_prompts(prompts, samples, mesh)
    spread: Spread = "prompts" if by_prompts else "samples"
    slots, each = shared_slots(
        sampling, lanes=lanes, prompts=prompts, samples=samples, spread=spread, rows=rows, prefill=prefill
    )
    if limits is None:
        limits = np.full((prompts, samples), sampling.max_new_tokens, np.int32)
    whole = Prompts(batch, features, np.arange(prompts), np.asarray(jax.random.key_data(keys)), limits)
    units = split_prompts(whole, each, lanes=lanes if spread == "prompts" else 1)
    ended = stream(
        graphdef,
        states,
        units,
        sampling=sampling,
        slots=slots,
        spread=spread,
        decode_text=decode_text,
        usage=usage,
        separate=separate,
        between=between,
    )
    return _collect(ended, (prompts, samples, sampling.max_new_tokens), pad_id)


def stream(
    graphdef: nnx.GraphDef,
    states: tuple[AnyState, ...],
    units: Iterable[Prompts],
    *,
    sampling: Sampling,
    slots: Slots,
    spread: Spread = "prompts",
    decode_text: Decode | None = None,
    usage: Usage | None = None,
    separate: bool | None = None,
    between: Callable[[], None] | None = None,
) -> Iterator[Task]:
    """Completions as they end. Units are taken one by one, when there is room for their prompts.

    `separate` holds each layer's weights, for the time of the rollout, as arrays of their own: a second copy of the decoder,
    where XLA would copy each layer out of its stack at every step; None: on CPU and GPU, where it would. States that are apart
    already are decoded from as they are, whatever it says. `between` is called before every run of decoding steps; what it
    raises ends the rollout.
    """
    if sampling.stop and decode_text is None:
        raise InputError("stop strings need the text", value=sampling.stop, fix="give decode_text")
    separate = are_apart(states) or (prefers_separate_layers() if separate is None else separate)
    layers = separate_layers(states) if separate else None
    model: Qwen2_5_VL = nnx.eval_shape(lambda states: merge_model(graphdef, *states), states)
    text, dtype = model.config.text, model.compute_dtype
    schedule = Schedule(slots, sampling.stop_ids, _ends(sampling.stop, decode_text), usage or Usage())
    queue, pool, cache, column = _Queue(units), None, None, 0
    while True:
        while (unit := queue.next) is not None and schedule.wants(_prompts_per_lane(unit, slots, spread)):
            pool = _room_for(pool, unit, text, slots, dtype, separate=separate)
            taken = schedule.add(unit.numbers, unit.keys, unit.limits, spread)
            pool = programs.prefill(graphdef, states, pool, unit.batch, unit.features, taken, spread=spread)
            queue.advance()
        if pool is None or schedule.idle:
            return
        if between is not None:
            between()
        plan = schedule.plan(more=queue.next is not None)
        if cache is None:
            cache = programs.empty_cache(text, len(plan.rows.tokens), plan.ring, dtype, separate=separate)
        elif plan.source is not None:
            old = programs.ring_length(cache)
            cache = programs.rearrange(cache, plan.source, np.int32(column), length=plan.ring)
            column = programs.last_column(old, plan.ring)
        cache, emitted = programs.decode(
            graphdef,
            states,
            layers,
            pool,
            cache,
            np.int32(column),
            plan.rows,
            sampling=sampling,
            max_steps=slots.max_steps,
        )
        emitted = jax.device_get(emitted)
        column = (column + int(emitted.steps)) % plan.ring
        yield from schedule.take(emitted)


def prefers_separate_layers() -> bool:
    """What is faster on this platform: of the programs compiled for CPU and H100, those that loop over a stack copy it whole
    at every step; TPUs read a layer where it lies."""
    return jax.default_backend() != "tpu"


def make_slots(
    sampling: Sampling, *, lanes: int = 1, prompts: int, samples: int, rows: int | None = None, prefill: int = 1
) -> Slots:
    """Room for `prompts` prompts of `samples` samples in each lane, `prefill` of them computed in one pass.

    Twice the prompts that fill the rows are held, because the last samples of a prompt outlive the others.

    Raises:
      InputError: there is nothing to sample, or no row to do it in.
    """
    for name, value in (("prompts", prompts), ("samples", samples), ("rows", rows), ("prefill", prefill)):
        if value is not None and value < 1:
            raise InputError(f"{name} of a rollout", value=value, expected="at least 1")
    rows = min(rows or prompts * samples, prompts * samples)
    held = -(-rows // samples) * (2 if samples > 1 else 1) + prefill
    steps = MAX_STEPS_WITH_STRINGS if sampling.stop else MAX_STEPS
    return Slots(lanes, rows, min(held, prompts), samples, steps, ring_lengths(FIRST_RING, sampling.max_new_tokens))


def shared_slots(
    sampling: Sampling,
    *,
    lanes: int,
    prompts: int,
    samples: int,
    spread: Spread,
    rows: int | None = None,
    prefill: int | None = None,
) -> tuple[Slots, int]:
    """The slots of lanes that share out a rollout's prompts, or the samples of each, and a lane's prompts per pass."""
    share, own = (prompts // lanes, samples) if spread == "prompts" else (prompts, samples // lanes)
    each = _largest_divisor(share, at_most=max((prefill or prompts) // (prompts // share), 1))
    return make_slots(
        sampling, lanes=lanes, prompts=share, samples=own, rows=rows and -(-rows // lanes), prefill=each
    ), each


def split_prompts(prompts: Prompts, each: int, *, lanes: int = 1) -> Iterator[Prompts]:
    """Units of `each` prompts per lane; the rows of `prompts` are those of lane 0, lane 1, …"""
    per_lane = len(prompts.numbers) // lanes
    for start in range(0, per_lane, each):
        stop = start + each

        def piece(x: Any, start: int = start, stop: int = stop) -> Any:
            return x.reshape(lanes, per_lane, *x.shape[1:])[:, start:stop].reshape(-1, *x.shape[1:])

        yield prompts if each == per_lane else jax.tree.map(piece, prompts)


class _Queue:
    """An iterator whose next item can be seen."""

    def __init__(self, units: Iterable[Prompts]) -> None:
        self._units = iter(units)
        self.advance()

    def advance(self) -> None:
        self.next = next(self._units, None)


def _ends(stop: Sequence[str], decode_text: Decode | None):
    def ends(ids: Sequence[int], new: int) -> int | None:
        return first_stop(ids, new, stop, decode_text) if stop and decode_text else None

    return ends


def _prompts_per_lane(unit: Prompts, slots: Slots, spread: Spread) -> int:
    return len(unit.numbers) // (slots.lanes if spread == "prompts" else 1)


def _room_for(pool: Pool | None, unit: Prompts, text: TextConfig, slots: Slots, dtype: Any, *, separate: bool) -> Pool:
    """A pool whose prompts may be as long as those of the unit."""
    length = unit.batch["tokens"].shape[1]
    if pool is None:
        return programs.empty_pool(text, slots.lanes * slots.prompts, length, dtype, separate=separate)
    return pool if length <= programs.pool_length(pool) else programs.lengthen(pool, length=length)


def _collect(ended: Iterable[Task], shape: tuple[int, int, int], pad_id: int) -> Rollout:
    ids, logprobs = np.full(shape, pad_id, np.int32), np.zeros(shape, np.float32)
    lengths, finished = np.zeros(shape[:2], np.int32), np.zeros(shape[:2], bool)
    for task in ended:
        where, length = (task.prompt, task.sample), len(task.ids)
        ids[where][:length], logprobs[where][:length] = task.ids, task.logprobs
        lengths[where], finished[where] = length, task.stopped
    return Rollout(*map(jnp.asarray, (ids, logprobs, lengths, finished)))


def _largest_divisor(number: int, *, at_most: int) -> int:
    return next(size for size in range(min(number, at_most), 0, -1) if number % size == 0)
