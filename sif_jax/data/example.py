"""A record to one training example, or to one prompt: tokens, positions, loss mask and patches (host)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import Float32, Int32
from PIL import Image

from sif_jax.errors import InputError
from sif_jax.models.qwen2_5_vl.chat import ChatProcessor, messages_with_images
from sif_jax.models.qwen2_5_vl.image_processor import PatchedImage, load_image
from sif_jax.sif.prompts import user_text
from sif_jax.sif.record import Record

Target = Literal["cot", "answer", "none"]


@dataclass(frozen=True)
class Example:
    tokens: Int32[np.ndarray, " L"]
    positions: Int32[np.ndarray, "L 3"]
    loss_mask: Float32[np.ndarray, " L"]
    images: tuple[PatchedImage, ...]
    record_index: int

    @property
    def num_patches(self) -> int:
        return sum(len(image.patches) for image in self.images)


@dataclass(frozen=True)
class ExampleEncoder:
    """Encodes records by index.

    The prompt is the same for every target: "cot" trains on the chain of thought, "answer" on the bare answer, "none" is
    the prompt alone, for rollouts.
    """

    records: Sequence[Record]
    image_root: Path
    chat: ChatProcessor
    target: Target
    depth_input: bool = True
    with_depth_words: bool = True

    def __call__(self, index: int) -> Example:
        """
        Raises:
          InputError: an image is missing or damaged, the depth image has another size than its image, or a record lacks
            what the prompt or the target needs.
        """
        record = self.records[index]
        text = user_text(record.problem, self.depth_input, self.with_depth_words)
        messages = messages_with_images([{"role": "user", "content": text}], self._images(record))
        if self.target == "none":
            _check_can_be_scored(record)
            encoded = self.chat.encode(messages)
            loss_mask = np.zeros(len(encoded.tokens), np.float32)
        else:
            encoded, loss_mask = self.chat.encode_example(messages, self._completion(record))
        return Example(*encoded[:2], loss_mask, encoded.images, index)

    def _images(self, record: Record) -> list[Image.Image]:
        image = load_image(self.image_root / record.image)
        if not self.depth_input:
            return [image]
        if record.depth_image is None:
            raise InputError("the record has no depth image", fix="set prompt.depth_input=false, or add depth images")
        depth = load_image(self.image_root / record.depth_image)
        if depth.size != image.size:
            raise InputError(
                "the depth image has another size than its image",
                file=self.image_root / record.depth_image,
                value="{}x{}".format(*depth.size),
                expected="{}x{}".format(*image.size),
                fix="make it from this image",
            )
        return [image, depth]

    def _completion(self, record: Record) -> str:
        if self.target == "answer":
            return record.response
        if record.completion is None:
            raise InputError(
                "the record has no chain of thought", fix="set target=answer, or add the assistant message"
            )
        return record.completion


def _check_can_be_scored(record: Record) -> None:
    if not record.gold_boxes:
        raise InputError(
            "the record has no gold boxes", fix="leave it out of reinforcement learning and evaluation, or annotate it"
        )
    if record.frame != "normalised":
        raise InputError(
            "gold boxes are in the wrong frame",
            value=record.frame,
            expected="normalised",
            fix="convert them with sif_jax.sif.boxes",
        )
