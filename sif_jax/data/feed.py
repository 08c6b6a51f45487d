"""A records file as batches for a run: what the config's data and prompt sections ask for (host)."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from jaxtyping import Float32

from sif_jax.config import DataConfig, PromptConfig
from sif_jax.data.batch import Collator
from sif_jax.data.example import ExampleEncoder, Target
from sif_jax.data.loader import Loader
from sif_jax.models.qwen2_5_vl.chat import ChatProcessor
from sif_jax.models.qwen2_5_vl.config import VisionConfig
from sif_jax.sif.depth_codec import read_depth
from sif_jax.sif.record import Record, RecordFile, read_records

SKIPPED_SHOWN = 5
DEPTH_MAPS_KEPT = 512  # a map of 512 x 512 pixels takes 1 MB


@dataclass(frozen=True)
class Feed:
    loader: Loader
    records: Sequence[Record]
    file: RecordFile

    @property
    def skipped(self) -> dict[int, str]:
        """Why each row that was passed over was, by its number in the file."""
        unreadable = {self.file.rows[index]: reason for index, reason in self.loader.skipped.items()}
        return dict(sorted((dict(self.file.skipped) | unreadable).items()))

    def report_skipped(self) -> None:
        skipped = list(self.skipped.values())
        if skipped:
            shown = "".join(f"\n  {reason}" for reason in skipped[:SKIPPED_SHOWN])
            more = "\n  …" if len(skipped) > SKIPPED_SHOWN else ""
            print(f"skipped {len(skipped)} rows:{shown}{more}", file=sys.stderr)

    def depth_maps(self, indices: Sequence[int] | np.ndarray) -> list[Float32[np.ndarray, "h w"] | None]:
        """The decoded depth map of each record, None where it has none."""
        paths = (self.records[index].depth_image for index in indices)
        return [None if path is None else _read_once(self.file.image_root / path) for path in paths]


_read_once = lru_cache(maxsize=DEPTH_MAPS_KEPT)(read_depth)


def open_feed(
    data: DataConfig,
    prompt: PromptConfig,
    chat: ChatProcessor,
    vision: VisionConfig,
    *,
    target: Target,
    batch_size: int,
    seed: int = 0,
    epochs: int | None = None,
    shuffle: bool = True,
    pack: bool = False,
    shard: int = 0,
    num_shards: int = 1,
    fixed_shape: bool = False,
) -> Feed:
    """Read the records and start the loader; `epochs=None` never ends. With `fixed_shape` all batches have
    the largest bucket's."""
    file = read_records(data.path, image_root=data.image_root, on_error=data.on_error)
    records = file.records[: data.limit]
    encoder = ExampleEncoder(records, file.image_root, chat, target, prompt.depth_input, prompt.with_depth_words)
    collator = Collator.for_model(chat, vision, data.buckets, batch_size, fixed_shape=fixed_shape)
    loader = Loader(
        encoder,
        len(records),
        collator,
        seed=seed,
        epochs=epochs,
        shuffle=shuffle,
        pack=pack,
        on_error=data.on_error,
        file=Path(data.path),
        rows=file.rows,
        shard=shard,
        num_shards=num_shards,
    )
    return Feed(loader, records, file)
