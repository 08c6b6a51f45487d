"""Completions without their padding: their tokens side by side in dense lanes, one lane per device (pure).

What treats every token alone (embedding, norms, linear layers: nearly all of a decoder's work) takes the lanes; attention takes
the padded completions. verl and flash-attn know it as remove-padding.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Array, Bool, Int, Int32, Shaped

from sif_jax.ops.windows import permute

SIZES = 8  # how many sizes a lane may have, each of which is a program: a sixteenth of the padded tokens is wasted on average


class Packing(NamedTuple):
    """A lane is a device's share of the padded tokens: those of its prompts or, where prompts do not divide, of its samples."""

    slots: Int[Array, "Z C"]  # which token of the lane stands in each slot, or -1
    places: Int[Array, "Z I"]  # the inverse: the slot of each token, or -1

    def packed(self, x: Shaped[Array, "P M T *rest"], *axes: str | None) -> Shaped[Array, "Z C *rest"]:
        """`axes` name those of `rest`, for the mesh; free slots are 0."""
        return permute(lanes(x, len(self.slots)), self.slots, self.places, axes)

    def padded(
        self, x: Shaped[Array, "Z C *rest"], shape: tuple[int, int, int], *axes: str | None
    ) -> Shaped[Array, "P M T *rest"]:
        """The inverse; `shape` is (P, M, T), padding is 0."""
        prompts, _, length = shape
        count, _, *rest = x.shape
        x = permute(x, self.places, self.slots, axes)
        if prompts % count:
            x = x.reshape(count, prompts, -1, length, *rest).swapaxes(0, 1)
        return x.reshape(*shape, *rest)


def lanes(x: Any, count: int) -> Any:
    """Of an array [P, M, T, *rest] of the host or the device: [Z, I, *rest]."""
    prompts, samples, length, *rest = x.shape
    if prompts % count:
        x = x.reshape(prompts, count, samples // count, length, *rest).swapaxes(0, 1)
    return x.reshape(count, -1, *rest)


def pack(mask: Bool[np.ndarray, "Z I"]) -> tuple[Int32[np.ndarray, "Z C"], Int32[np.ndarray, "Z I"]] | None:
    """What a `Packing` holds, for the smallest lanes of a few sizes that have room for the mask's tokens; None where that
    is room for all."""
    count, size = mask.shape
    unit = -(-size // SIZES)
    room = max(-(-int(mask.sum(1).max()) // unit), 1) * unit
    if room >= size:
        return None
    places = np.where(mask, np.cumsum(mask, axis=1) - 1, -1).astype(np.int32)
    lane, token = np.nonzero(mask)
    slots = np.full((count, room), -1, np.int32)
    slots[lane, places[lane, token]] = token
    return slots, places
