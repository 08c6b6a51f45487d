"""Shuffled, sharded, resumable batches of a record file, encoded ahead by Grain's threads (host)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal

import grain
import numpy as np

from sif_jax.data.batch import Batch, Collator, RowFiller
from sif_jax.data.example import Example
from sif_jax.errors import InputError

State = dict[str, int]


class Loader(Iterator[Batch]):
    """Batches in an order fixed by `seed`; every epoch is shuffled anew, and batches run on across epochs.

    `epochs=None` never ends; otherwise the last batch is filled up with rows of padding. Of `num_shards` loaders, each
    yields its own run of rows of every batch, the same rows whatever their number, and all yield as many batches. It encodes
    these alone, unless the place of an example depends on those before it, packed or skipped: then it encodes all and yields
    its own.

    `get_state()` is plain JSON and the same on every shard, in examples of the whole stream; after `set_state()` on an equal
    loader, or on one of another number of shards, the same batches follow. `skipped` maps the index
    of each record that `on_error="skip"` passed over to the reason, which tells its row in `file`.
    """

    def __init__(
        self,
        encode: Callable[[int], Example],
        num_records: int,
        collate: Collator,
        *,
        seed: int,
        epochs: int | None = None,
        shuffle: bool = True,
        pack: bool = False,
        on_error: Literal["raise", "skip"] = "raise",
        file: Path | None = None,
        rows: Sequence[int] | None = None,
        shard: int = 0,
        num_shards: int = 1,
        num_threads: int = 4,
        prefetch: int = 32,
    ):
        if num_records == 0:
            raise InputError("there are no records to load", file=file, fix="check data.path")
        self._file, self._rows = file, rows or range(1, num_records + 1)
        self.skipped: dict[int, str] = {}
        self._encode, self._num_records, self._collate = encode, num_records, collate
        self._pack, self._on_error = pack, on_error
        indices = grain.MapDataset.range(num_records)
        if shuffle:
            indices = indices.shuffle(seed=int(np.random.SeedSequence(seed).generate_state(1)[0]))
        stream = indices.repeat(epochs)
        self._rows_kept, self._drawn_elsewhere = collate.rows_of(shard, num_shards), 1
        self._given, self._at_least = 0, 0  # batches
        if num_shards > 1 and not (pack or on_error == "skip"):
            if epochs is not None:  # the last batches may have no row for this shard
                self._at_least = -(-num_records * epochs // collate.batch_size)
            self._collate = collate = dataclasses.replace(collate, batch_size=collate.batch_size // num_shards)
            stream = _RunOfRows(stream, shard, num_shards, collate.batch_size)
            self._rows_kept, self._drawn_elsewhere = slice(None), num_shards
        options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=prefetch)
        self._stream = iter(stream.map(self._try_encode).to_iter_dataset(options))
        self._next_state: State = self._stream.get_state()
        self._pending: Example | None = None

    def get_state(self) -> State:
        return {name: count * self._drawn_elsewhere for name, count in self._next_state.items()}

    def set_state(self, state: State) -> None:
        own = {name: count // self._drawn_elsewhere for name, count in state.items()}
        self._stream.set_state(dict(own))
        self._next_state, self._pending = own, None
        self._given = own["next_index"] // self._collate.batch_size

    def __next__(self) -> Batch:
        filler = RowFiller(self._collate, pack=self._pack)
        example = self._pending or self._draw()
        while example is not None and filler.add(example):
            self._next_state = self._stream.get_state()
            example = self._draw()
        self._pending = example
        if not filler.rows and self._given >= self._at_least:
            raise StopIteration
        self._given += 1
        return self._collate(filler.rows).rows(self._rows_kept)

    def _draw(self) -> Example | None:
        for _ in range(self._num_records):
            drawn = next(self._stream, None)
            if not isinstance(drawn, tuple):
                return drawn
            index, error = drawn
            if self._on_error == "raise":
                raise error
            self.skipped[index] = str(error)
        raise InputError(
            f"all of {self._num_records} records in a row failed, the first so: {next(iter(self.skipped.values()))}"
        )

    def _try_encode(self, index: int) -> Example | tuple[int, InputError]:
        """An error travels in its place of the stream, so that skipping does not depend on the threads."""
        try:
            example = self._encode(index)
            self._collate.check([example])
        except InputError as error:
            return index, InputError(str(error), file=self._file, row=self._rows[index])
        return example


class _RunOfRows(grain.MapDataset[int]):
    """Of every `num_shards * rows` elements, run number `shard` of `rows`."""

    def __init__(self, parent: grain.MapDataset[int], shard: int, num_shards: int, rows: int):
        super().__init__(parent)
        self._shard, self._num_shards, self._rows = shard, num_shards, rows

    def __len__(self) -> int:
        whole, rest = divmod(len(self._parent), self._num_shards * self._rows)
        return whole * self._rows + min(max(rest - self._shard * self._rows, 0), self._rows)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return self.slice(index)
        batch, row = divmod(index, self._rows)
        return self._parent[(batch * self._num_shards + self._shard) * self._rows + row]
