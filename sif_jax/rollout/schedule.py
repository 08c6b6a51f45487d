"""Which sample is decoded in which row, and when (host).

Samples wait in the order in which they come. A row that has ended takes the next one; when nothing waits any more, live rows
close up, and there are fewer rows. Everything follows from the tokens alone, so every process of a job, and a repeated
run, takes the same decisions.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Float, Int, UInt32

MIN_ROWS = 4  # fewer save no time: a step then reads the weights, whatever the rows
REFILL_SHARE = 16  # of the rows; so many ends are worth a word with the host
NEVER = 2**30
KEY_WORDS = 2  # of a threefry key

Spread = Literal["prompts", "samples"]  # what the lanes share out: the prompts, or the samples of every prompt


class Rows(NamedTuple):
    """What is going on in the rows: R of lane 0, then R of lane 1, …"""

    tokens: Int[Any, "rows"]  # the last one chosen, not in the cache yet
    lengths: Int[Any, "rows"]  # tokens chosen so far; 0: the first comes from the prompt's logits
    limits: Int[Any, "rows"]  # tokens at most; 0: the row is empty
    keys: UInt32[Any, "rows word"]
    slots: Int[Any, "lane R"]  # of the prompt in its lane's pool
    members: Int[Any, "lane G M"]  # see `row_attention`
    place: Int[Any, "lane R"]
    patience: Int[Any, "lane"]  # come back when so many rows of a lane have ended
    shrink_at: Int[Any, ""]  # or when no lane has more live rows than this


class Emitted(NamedTuple):
    """Column 0 holds the first tokens of fresh rows, column 1 + i what step i chose."""

    tokens: Int[Any, "rows column"]
    logprobs: Float[Any, "rows column"]
    lengths: Int[Any, "rows"]  # tokens chosen so far
    steps: Int[Any, ""]


@dataclass(frozen=True)
class Slots:
    """Sizes of a rollout, per lane but for `lanes`."""

    lanes: int
    rows: int  # decoded at once
    prompts: int  # held at once
    samples: int  # of one prompt
    max_steps: int  # between two words with the host
    rings: tuple[int, ...]  # lengths that the rows' cache may have, ascending; the last holds any completion


@dataclass
class Task:
    """One completion: number `sample` of a prompt."""

    prompt: int
    sample: int
    slot: int
    limit: int  # tokens
    key: UInt32[np.ndarray, " word"]
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    stopped: bool = False  # by a stop token or string; else cut at its limit


class Plan(NamedTuple):
    """The next call of `decode`."""

    source: Int[np.ndarray, "lane R"] | None  # where in its lane each row comes from, when the cache changes its shape
    ring: int
    rows: Rows


@dataclass
class Usage:
    """How well the rows were used, since this was made."""

    row_steps: int = 0  # rows times steps, over all lanes
    useful: int = 0  # those whose token is in a completion
    steps: int = 0
    prompts: int = 0
    tokens: int = 0

    @property
    def share(self) -> float:
        return self.useful / max(self.row_steps, 1)


class _Lane:
    def __init__(self, prompts: int) -> None:
        self.rows: list[Task | None] = []
        self.waiting: deque[Task] = deque()
        self.free = list(range(prompts))  # slots of the pool
        self.open: dict[int, int] = {}  # slot → samples that have not ended

    def live(self) -> list[tuple[int, Task]]:
        return [(row, task) for row, task in enumerate(self.rows) if task is not None]

    def take_slot(self, samples: int) -> int:
        slot = self.free.pop(0)
        self.open[slot] = samples
        return slot

    def end(self, row: int, task: Task) -> None:
        self.rows[row] = None
        self.open[task.slot] -= 1
        if not self.open[task.slot]:
            del self.open[task.slot]
            self.free.append(task.slot)


class Schedule:
    """`ends(ids, new)` tells how many tokens a completion keeps when a stop string is among its `new` last ones."""

    def __init__(
        self, slots: Slots, stop_ids: Sequence[int], ends: Callable[[Sequence[int], int], int | None], usage: Usage
    ) -> None:
        self._slots, self._stop_ids, self._ends, self._usage = slots, frozenset(stop_ids), ends, usage
        self._lanes = [_Lane(slots.prompts) for _ in range(slots.lanes)]
        self._ring = 0

    @property
    def idle(self) -> bool:
        return not any(lane.live() or lane.waiting for lane in self._lanes)

    def wants(self, prompts: int) -> bool:
        """Whether so many more prompts per lane have slots, and some lane has rows for them."""
        rows = self._slots.rows
        hungry = any(len(lane.live()) + len(lane.waiting) < rows for lane in self._lanes)
        return hungry and all(len(lane.free) >= prompts for lane in self._lanes)

    def add(
        self,
        numbers: Int[np.ndarray, "F"],
        keys: UInt32[np.ndarray, "F M word"],
        limits: Int[np.ndarray, "F M"],
        spread: Spread,
    ) -> Int[np.ndarray, "lane each"]:
        """The samples of more prompts wait; returns the slot that each prompt gets. A prompt numbered -1 is padding."""
        lanes, (prompts, samples) = self._slots.lanes, limits.shape
        each = prompts // lanes if spread == "prompts" else prompts
        share = samples if spread == "prompts" else samples // lanes
        slots = np.full((lanes, each), self._slots.prompts, np.int32)
        for number, lane in enumerate(self._lanes):
            first_prompt = number * each if spread == "prompts" else 0
            first_sample = 0 if spread == "prompts" else number * share
            for place in range(each):
                prompt = first_prompt + place
                if numbers[prompt] < 0:
                    continue
                slots[number, place] = slot = lane.take_slot(share)
                lane.waiting.extend(
                    Task(int(numbers[prompt]), sample, slot, int(limits[prompt, sample]), keys[prompt, sample])
                    for sample in range(first_sample, first_sample + share)
                )
        self._usage.prompts += int((numbers >= 0).sum())
        return slots

    def plan(self, *, more: bool) -> Plan:
        """Give free rows to waiting samples; `more`: further prompts will come."""
        before = len(self._lanes[0].rows)
        wanted = max(min(len(lane.live()) + len(lane.waiting), self._slots.rows) for lane in self._lanes)
        width = next(size for size in reversed(row_sizes(self._slots.rows)) if size >= wanted)
        sources = [self._resize(lane, width) for lane in self._lanes]
        for lane in self._lanes:
            for row in range(width):
                if lane.rows[row] is None and lane.waiting:
                    lane.rows[row] = lane.waiting.popleft()
        needed = self._needed_ring()
        ring = needed if width != before else max(needed, self._ring)
        changed = width != before or ring != self._ring
        self._ring = ring
        return Plan(np.array(sources, np.int32) if changed else None, ring, self._rows(width, more=more))

    def take(self, emitted: Emitted) -> list[Task]:
        """Hand the tokens to their samples; returns those that have ended."""
        lanes = len(self._lanes)
        tokens, logprobs, lengths = (np.asarray(x).reshape(lanes, -1, *x.shape[1:]) for x in emitted[:3])
        ended = []
        for number, lane in enumerate(self._lanes):
            for row, task in lane.live():
                if self._extend(task, tokens[number, row], logprobs[number, row], int(lengths[number, row])):
                    lane.end(row, task)
                    ended.append(task)
        self._usage.steps += int(emitted.steps)
        self._usage.row_steps += int(emitted.steps) * emitted.lengths.size
        return ended

    def _resize(self, lane: _Lane, width: int) -> list[int]:
        """Live rows close up when rows are given up, else stay where they are; returns where each row was."""
        live = lane.live()
        if width < len(lane.rows):
            lane.rows = [task for _, task in live] + [None] * (width - len(live))
            return [row for row, _ in live] + [0] * (width - len(live))
        kept = list(range(len(lane.rows)))
        lane.rows += [None] * (width - len(kept))
        return kept + [0] * (width - len(kept))

    def _needed_ring(self) -> int:
        steps = self._slots.max_steps
        longest = max(
            (min(task.limit, len(task.ids) + steps) for lane in self._lanes for task in lane.rows if task), default=1
        )
        return next(length for length in self._slots.rings if length >= longest)

    def _rows(self, width: int, *, more: bool) -> Rows:
        slots = self._slots
        rows = empty_rows(slots, width)
        for number, lane in enumerate(self._lanes):
            filled = [0] * slots.prompts
            for row, task in lane.live():
                flat = number * width + row
                rows.tokens[flat] = task.ids[-1] if task.ids else 0
                rows.lengths[flat], rows.limits[flat], rows.keys[flat] = len(task.ids), task.limit, task.key
                rows.slots[number, row] = task.slot
                rows.members[number, task.slot, filled[task.slot]] = row
                rows.place[number, row] = task.slot * slots.samples + filled[task.slot]
                filled[task.slot] += 1
            if more or lane.waiting:
                rows.patience[number] = max(width // REFILL_SHARE, 1)
        smaller = [size for size in row_sizes(slots.rows) if size < width]
        waiting = more or any(lane.waiting for lane in self._lanes)
        return rows._replace(shrink_at=np.int32(smaller[0] if smaller and not waiting else 0))

    def _extend(self, task: Task, tokens: np.ndarray, logprobs: np.ndarray, length: int) -> bool:
        """Whether the sample has ended."""
        fresh = not task.ids
        new = length - len(task.ids)
        part = slice(0 if fresh else 1, new + (not fresh))
        task.ids += tokens[part].tolist()
        task.logprobs += logprobs[part].tolist()
        kept = self._ends(task.ids, new)
        if kept is not None:
            del task.ids[kept:], task.logprobs[kept:]
        task.stopped = kept is not None or task.ids[-1] in self._stop_ids
        chosen = new - (length - len(task.ids))
        self._usage.tokens += chosen
        self._usage.useful += chosen - fresh
        return task.stopped or len(task.ids) == task.limit


def empty_rows(slots: Slots, width: int) -> Rows:
    def zeros(*shape: int) -> Int[np.ndarray, "*shape"]:
        return np.zeros(shape, np.int32)

    rows = slots.lanes * width
    return Rows(
        tokens=zeros(rows),
        lengths=zeros(rows),
        limits=zeros(rows),
        keys=np.zeros((rows, KEY_WORDS), np.uint32),
        slots=zeros(slots.lanes, width),
        members=zeros(slots.lanes, slots.prompts, slots.samples),
        place=zeros(slots.lanes, width),
        patience=zeros(slots.lanes) + NEVER,
        shrink_at=np.int32(0),
    )


def row_sizes(rows: int) -> list[int]:
    """How many rows a rollout may have, from all of them downwards: halves, and three quarters between them."""
    sizes = [rows]
    while sizes[-1] > MIN_ROWS:
        whole = sizes[-1]
        sizes += [max(-(-whole * part // 4), MIN_ROWS) for part in (3, 2)]
    return sorted(set(sizes), reverse=True)


def ring_lengths(first: int, longest: int) -> tuple[int, ...]:
    """Doubling, so that early tokens do not read a cache that is mostly empty."""
    lengths = [min(first, longest)]
    while lengths[-1] < longest:
        lengths.append(min(2 * lengths[-1], longest))
    return tuple(lengths)
