"""Which sample is decoded where: rows are refilled, close up and never mix samples; most steps are of use."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sif_jax.errors import InputError
from sif_jax.rollout.engine import make_slots
from sif_jax.rollout.sampling import Sampling
from sif_jax.rollout.schedule import Schedule, Usage, ring_lengths, row_sizes
from tests.fake_device import STOP, decode


def simulate(lengths, *, limit, rows=None, prefill=1, lanes=1, spread="prompts"):
    """Run a schedule to its end; returns the ended samples, the usage, and each call's (rows, ring)."""
    prompts, samples = lengths.shape
    shared = lanes if spread == "prompts" else 1
    slots = make_slots(
        Sampling(limit, (STOP,)),
        lanes=lanes,
        prompts=prompts // shared,
        samples=samples // (lanes // shared),
        rows=rows,
        prefill=prefill,
    )
    usage, ended, calls, start = Usage(), [], [], 0
    schedule = Schedule(slots, (STOP,), lambda ids, new: None, usage)
    keys = np.stack(np.broadcast_arrays(*np.indices(lengths.shape)), axis=-1).astype(np.uint32)
    planned = {tuple(key): int(length) for key, length in zip(keys.reshape(-1, 2).tolist(), lengths.reshape(-1))}
    while True:
        while start < prompts and schedule.wants(prefill):
            numbers = np.arange(start, start + prefill * shared)
            limits = np.full((len(numbers), samples), limit, np.int32)
            taken = schedule.add(numbers, keys[numbers], limits, spread)
            assert (taken < slots.prompts).all()
            start += len(numbers)
        if schedule.idle:
            return ended, usage, calls
        plan = schedule.plan(more=start < prompts)
        calls.append((plan.rows.tokens.size // lanes, plan.ring))
        check(plan.rows)
        ended += schedule.take(decode(plan.rows, planned, slots.max_steps))


def check(rows):
    """Every live row stands among the members of its prompt."""
    lanes, _, samples = rows.members.shape
    width = rows.tokens.size // lanes
    for flat in np.flatnonzero(rows.limits):
        lane, row = divmod(int(flat), width)
        slot, member = divmod(int(rows.place[lane, row]), samples)
        assert slot == rows.slots[lane, row]
        assert rows.members[lane, slot, member] == row


def mix(low, high, prompts=8, samples=8):
    lengths = np.linspace(low, high, prompts * samples).round().astype(int)
    return np.random.default_rng(0).permutation(lengths).reshape(prompts, samples)


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_every_sample_gets_all_its_tokens_once_whatever_the_sizes(data):
    lanes = data.draw(st.sampled_from([1, 2]))
    spread = data.draw(st.sampled_from(["prompts", "samples"]))
    prompts, samples = lanes * data.draw(st.integers(1, 4)), lanes * data.draw(st.integers(1, 4))
    prefill = data.draw(st.sampled_from([1, prompts // lanes if spread == "prompts" else prompts]))
    rows = data.draw(st.one_of(st.none(), st.integers(1, 20)))
    limit = data.draw(st.sampled_from([1, 5, 90]))
    seed = data.draw(st.integers(0, 99))
    lengths = np.random.default_rng(seed).integers(1, 100, (prompts, samples))
    ended, usage, _ = simulate(lengths, limit=limit, rows=rows, prefill=prefill, lanes=lanes, spread=spread)
    assert sorted((task.prompt, task.sample) for task in ended) == list(np.ndindex(prompts, samples))
    for task in ended:
        length = lengths[task.prompt, task.sample]
        assert len(task.ids) == len(task.logprobs) == min(length, limit)
        assert task.stopped == (length <= limit)
        assert set(task.ids[:-1]) <= {7}
    assert usage.tokens == np.minimum(lengths, limit).sum()
    assert usage.useful == usage.tokens - lengths.size, "the first token of each comes from its prompt"


@pytest.mark.parametrize(("low", "high"), [(16, 512), (16, 256)])
def test_most_row_steps_are_of_use_on_a_mix_of_lengths(low, high, measured):
    _, usage, _ = simulate(mix(low, high), limit=high, rows=32)
    measured(f"row-steps wasted, 64 samples of {low} to {high} tokens in 32 rows", 1 - usage.share, at_most=0.1)
    _, usage, _ = simulate(mix(low, high), limit=high, rows=48)
    measured(f"row-steps wasted, 64 samples of {low} to {high} tokens in 48 rows", 1 - usage.share, at_most=0.15)
    _, usage, _ = simulate(mix(low, high), limit=high)
    measured(f"row-steps wasted, 64 samples of {low} to {high} tokens in 64 rows", 1 - usage.share, at_most=0.15)
    _, usage, _ = simulate(mix(low, high, prompts=64), limit=high, rows=64)
    measured(f"row-steps wasted, 512 samples of {low} to {high} tokens in 64 rows", 1 - usage.share, at_most=0.08)


def test_rows_are_refilled_before_they_close_up_and_the_ring_grows_with_the_longest_sample():
    _, _, calls = simulate(mix(16, 300), limit=300, rows=32)
    rows, rings = [call[0] for call in calls], [call[1] for call in calls]
    assert rows == sorted(rows, reverse=True)
    assert set(rows) == {32, 24, 16, 12, 8, 6, 4}
    assert rings == sorted(rings)
    assert set(rings) == {64, 128, 256, 300}


def test_few_programs_are_needed():
    _, _, calls = simulate(mix(16, 512, prompts=32), limit=512, rows=32)
    assert len(set(calls)) <= len(row_sizes(32)) + len(ring_lengths(64, 512)) - 1


def test_row_sizes_go_down_to_four_by_halves_and_three_quarters():
    assert row_sizes(64) == [64, 48, 32, 24, 16, 12, 8, 6, 4]
    assert row_sizes(9) == [9, 7, 5, 4]
    assert row_sizes(2) == [2]


def test_a_row_of_padding_gets_no_slot_and_no_sample():
    slots = make_slots(Sampling(8, ()), prompts=4, samples=1, prefill=2)
    schedule = Schedule(slots, (), lambda ids, new: None, Usage())
    taken = schedule.add(np.array([5, -1]), np.zeros((2, 1, 2), np.uint32), np.full((2, 1), 8, np.int32), "prompts")
    assert taken.tolist() == [[0, slots.prompts]]
    assert (schedule.plan(more=False).rows.limits > 0).sum() == 1


def test_sizes_that_cannot_be_are_refused():
    with pytest.raises(InputError, match="rows of a rollout; got 0"):
        make_slots(Sampling(8, ()), prompts=4, samples=1, rows=0)
    with pytest.raises(InputError, match="samples of a rollout; got 0"):
        make_slots(Sampling(8, ()), prompts=4, samples=0)
