"""A records file as batches for a run: what the config's data and prompt sections ask for (host)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
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
from sif_jax.sif.record import Record, read_records


@dataclass(frozen=True)
class Feed:
    loader: Loader
    records: Sequence[Record]
    image_root: Path

    def depth_maps(self, indices: Sequence[int]) -> list[Float32[np.ndarray, "h w"] | None]:
        """The decoded depth map of each record, None where it has none."""
        paths = (self.records[index].depth_image for index in indices)
        return [None if path is None else _read_once(self.image_root / path) for path in paths]


_read_once = cache(read_depth)


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
) -> Feed:
    """Read the records and start the loader; `epochs=None` never ends."""
    file = read_records(data.path, image_root=data.image_root, on_error=data.on_error)
    records = file.records[: data.limit]
    encoder = ExampleEncoder(records, file.image_root, chat, target, prompt.depth_input, prompt.with_depth_words)
    collator = Collator.for_model(chat, vision, data.buckets, batch_size)
    loader = Loader(
        encoder,
        len(records),
        collator,
        seed=seed,
        epochs=epochs,
        shuffle=shuffle,
        pack=pack,
        on_error=data.on_error,
    )
    return Feed(loader, records, file.image_root)
