"""Examples to one batch of arrays, padded to the smallest bucket that fits (host).

The arrays are the batch contract of docs/architecture.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from sif_jax.config import BucketsConfig
from sif_jax.data.example import Example
from sif_jax.errors import InputError
from sif_jax.models.qwen2_5_vl.chat import ChatProcessor
from sif_jax.models.qwen2_5_vl.config import VisionConfig
from sif_jax.models.qwen2_5_vl.layout import Grid, max_windows, patch_positions, patch_segments, window_layout

Row = Sequence[Example]


class Waste(NamedTuple):
    """Share of the batch that is padding."""

    tokens: float
    patches: float


class Batch(NamedTuple):
    """`records` names the records packed in each row; a row of padding has none."""

    arrays: dict[str, np.ndarray]
    records: tuple[tuple[int, ...], ...]
    waste: Waste

    def rows(self, kept: slice) -> Batch:
        """Some of the rows; all of them are this batch itself."""
        if kept == slice(None):
            return self
        arrays = {name: array[kept] for name, array in self.arrays.items()}
        return Batch(arrays, self.records[kept], _waste(arrays))


@dataclass(frozen=True)
class Collator:
    """Makes batches of `batch_size` rows, each of one example or of several packed ones.

    `fixed_shape` always takes the largest bucket, as every process of a multi-process job must make the same shapes.
    """

    buckets: BucketsConfig
    batch_size: int
    pad_id: int
    image_token_id: int
    merge_size: int = 2
    window_patches: int = 8
    patch_dim: int = 1176
    fixed_shape: bool = False

    @classmethod
    def for_model(
        cls,
        chat: ChatProcessor,
        vision: VisionConfig,
        buckets: BucketsConfig,
        batch_size: int,
        *,
        fixed_shape: bool = False,
    ) -> Collator:
        images = chat.image_processor
        ours, theirs = (images.patch_size, images.merge_size), (vision.patch_size, vision.spatial_merge_size)
        if ours != theirs:
            raise InputError(
                "image processor and model disagree on (patch_size, merge_size)", value=ours, expected=str(theirs)
            )
        merged_side = vision.window_size // vision.patch_size // vision.spatial_merge_size
        return cls(
            buckets=buckets,
            batch_size=batch_size,
            pad_id=chat.pad_id,
            image_token_id=chat.ids.image_pad,
            merge_size=vision.spatial_merge_size,
            window_patches=merged_side * vision.spatial_merge_size,
            patch_dim=vision.patch_dim,
            fixed_shape=fixed_shape,
        )

    def rows_of(self, shard: int, num_shards: int) -> slice:
        """The run of rows that is part `shard` of `num_shards` equal ones."""
        if num_shards == 1:
            return slice(None)
        each, rest = divmod(self.batch_size, num_shards)
        if rest:
            raise InputError(
                "rows do not divide over the processes",
                value=self.batch_size,
                expected=f"a multiple of {num_shards}",
                fix="change batch_size or prompts_per_step",
            )
        return slice(shard * each, (shard + 1) * each)

    def check(self, row: Row) -> None:
        """
        Raises:
          InputError: the row is longer than the largest bucket, or an example's tokens do not show its images.
        """
        for example in row:
            self._check_images(example)
        for kind, length in (("tokens", _num_tokens(row)), ("patches", _num_patches(row))):
            largest = getattr(self.buckets, kind)[-1]
            if length > largest:
                raise InputError(
                    f"the example has too many {kind}",
                    value=length,
                    expected=f"at most {largest}, the largest bucket",
                    fix=f"raise data.buckets.{kind}, or lower model.max_pixels",
                )

    def _check_images(self, example: Example) -> None:
        unit, num_tokens = self.merge_size**2, int((example.tokens == self.image_token_id).sum())
        if num_tokens * unit != example.num_patches:
            raise InputError(
                "the image tokens do not match the images",
                value=f"{num_tokens} image tokens and {example.num_patches} patches",
                expected=f"one token for {unit} patches",
                fix="encode the messages with the images",
            )
        for number, (patches, (height, width)) in enumerate(example.images, 1):
            if patches.shape != (height * width, self.patch_dim):
                raise InputError(
                    f"the patches of image {number} do not fill its grid",
                    value=list(patches.shape),
                    expected=f"[{height} * {width}, {self.patch_dim}]",
                )

    def __call__(self, rows: Sequence[Row]) -> Batch:
        for row in rows:
            self.check(row)
        arrays = self._padding(*self._bucket(rows))
        for index, row in enumerate(rows):
            self._write_row({name: array[index] for name, array in arrays.items()}, row)
        records = tuple(tuple(example.record_index for example in row) for row in rows)
        return Batch(arrays, records + ((),) * (self.batch_size - len(rows)), _waste(arrays))

    def _bucket(self, rows: Sequence[Row]) -> tuple[int, int]:
        """The first bucket that holds every row in both tokens and patches."""
        if self.fixed_shape:
            return self.buckets.pairs[-1]
        tokens, patches = max(map(_num_tokens, rows), default=0), max(map(_num_patches, rows), default=0)
        return next(bucket for bucket in self.buckets.pairs if tokens <= bucket[0] and patches <= bucket[1])

    def _padding(self, L: int, V: int) -> dict[str, np.ndarray]:
        B, S = self.batch_size, self.window_patches**2
        W = max_windows(V, merge_size=self.merge_size, window_patches=self.window_patches)
        return {
            "tokens": np.full((B, L), self.pad_id, np.int32),
            "positions": np.zeros((B, L, 3), np.int32),
            "segments": np.zeros((B, L), np.int32),
            "loss_mask": np.zeros((B, L), np.float32),
            "image_index": np.full((B, L), -1, np.int32),
            "patches": np.zeros((B, V, self.patch_dim), np.float32),
            "patch_positions": np.zeros((B, V, 2), np.int32),
            "patch_segments": np.zeros((B, V), np.int32),
            "windows": np.full((B, W, S), -1, np.int32),
            "window_segments": np.zeros((B, W, S), np.int32),
            "window_slot": np.zeros((B, V), np.int32),
        }

    def _write_row(self, arrays: dict[str, np.ndarray], row: Row) -> None:
        start = 0
        for number, example in enumerate(row, 1):
            span = slice(start, start + len(example.tokens))
            arrays["tokens"][span] = example.tokens
            arrays["positions"][span] = example.positions
            arrays["segments"][span] = number
            arrays["loss_mask"][span] = example.loss_mask
            start = span.stop
        shown = arrays["tokens"][:start] == self.image_token_id
        arrays["image_index"][:start][shown] = np.arange(shown.sum())
        self._write_images(arrays, row)

    def _write_images(self, arrays: dict[str, np.ndarray], row: Row) -> None:
        grids, num_patches = _grids(row), _num_patches(row)
        layout = window_layout(grids, merge_size=self.merge_size, window_patches=self.window_patches)
        images = [image.patches for example in row for image in example.images]
        if images:
            np.concatenate(images, out=arrays["patches"][:num_patches])
        arrays["patch_positions"][:num_patches] = patch_positions(grids, merge_size=self.merge_size)
        arrays["patch_segments"][:num_patches] = patch_segments(grids)
        arrays["windows"][: len(layout.windows)] = layout.windows
        arrays["window_segments"][: len(layout.windows)] = layout.segments
        arrays["window_slot"][:num_patches] = layout.slots


class RowFiller:
    """Puts examples into the rows of one batch, in order: one per row, or first-fit when packing."""

    def __init__(self, collator: Collator, *, pack: bool):
        self.rows: list[list[Example]] = []
        self._collator = collator
        self._pack = pack

    def add(self, example: Example) -> bool:
        """False when the example has to wait for the next batch."""
        row = next((row for row in self.rows if self._pack and self._fits(row, example)), None)
        if row is None and len(self.rows) == self._collator.batch_size:
            return False
        if row is None:
            self.rows.append([example])
        else:
            row.append(example)
        return True

    def _fits(self, row: Row, example: Example) -> bool:
        tokens, patches = self._collator.buckets.pairs[-1]
        longer = [*row, example]
        return _num_tokens(longer) <= tokens and _num_patches(longer) <= patches


def _num_tokens(row: Row) -> int:
    return sum(len(example.tokens) for example in row)


def _num_patches(row: Row) -> int:
    return sum(example.num_patches for example in row)


def _grids(row: Row) -> list[Grid]:
    return [image.grid_hw for example in row for image in example.images]


def _waste(arrays: dict[str, np.ndarray]) -> Waste:
    padding = (arrays[name] == 0 for name in ("segments", "patch_segments"))
    return Waste(*(float(padded.mean()) if padded.size else 0.0 for padded in padding))
