"""Where patches and tokens stand: patch positions, attention windows and M-RoPE positions, from the image grids (host).

A grid is (height, width) in patches. Patches stay in merge-block raster order throughout: image after image, blocks of
merge x merge patches in raster order, patches within a block in raster order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int, Int32

Grid = tuple[int, int]


class WindowLayout(NamedTuple):
    """Attention windows in dense rows of S slots, several small windows to a row.

    `windows` names the patch in each slot, or -1; `segments` its attention window (1, 2, ...), or 0; `slots` is the
    inverse: windows.flat[slots[v]] = v.
    """

    windows: Int32[np.ndarray, "W S"]
    segments: Int32[np.ndarray, "W S"]
    slots: Int32[np.ndarray, " V"]


def num_patches(grids: Sequence[Grid]) -> int:
    return sum(height * width for height, width in grids)


def patch_positions(grids: Sequence[Grid], *, merge_size: int) -> Int32[np.ndarray, "V 2"]:
    """(h, w) of every patch within its image."""
    return _concatenate([_block_order(np.indices(grid), merge_size).reshape(2, -1).T for grid in grids], (0, 2))


def patch_segments(grids: Sequence[Grid]) -> Int32[np.ndarray, " V"]:
    """1, 2, ...: the image of every patch."""
    return np.repeat(np.arange(1, len(grids) + 1, dtype=np.int32), [height * width for height, width in grids])


def window_layout(grids: Sequence[Grid], *, merge_size: int, window_patches: int) -> WindowLayout:
    """Windows of `window_patches` x `window_patches` patches; those at an image's right and bottom edge hold fewer.

    Windows, and the patches in each, are numbered as in transformers' `get_vision_window_index`; each window goes into
    the first dense row that has room for it.
    """
    window_of_patch, num_windows = [], 0
    for height, width in grids:
        columns = -(-width // window_patches)
        rows_of, columns_of = _block_order(np.indices((height, width)), merge_size).reshape(2, -1) // window_patches
        window_of_patch.append(num_windows + rows_of * columns + columns_of)
        num_windows += -(-height // window_patches) * columns
    return _fill_windows(_concatenate(window_of_patch, (0,)), num_windows, window_patches**2)


def max_windows(patches: int, *, merge_size: int, window_patches: int) -> int:
    """Dense rows that suffice for any images of this many patches in all.

    First fit leaves at most one row half full or emptier, and windows hold whole merge units.
    """
    capacity = (window_patches // merge_size) ** 2
    return -(-(patches // merge_size**2) // (capacity // 2 + 1))


def mrope_positions(
    tokens: Int[np.ndarray, " L"], grids: Sequence[Grid], *, image_token_id: int, merge_size: int
) -> Int32[np.ndarray, "L 3"]:
    """(t, h, w) of every token (M-RoPE, arXiv:2409.12191): text counts up, an image shares t and spreads over h and w.

    Raises:
      ValueError: the image tokens are not one unbroken run of h/merge * w/merge per grid.
    """
    positions = np.empty((len(tokens), 3), np.int32)
    image_tokens = np.flatnonzero(tokens == image_token_id)
    done, shift, used = 0, 0, 0
    for height, width in grids:
        merged = height // merge_size, width // merge_size
        count = merged[0] * merged[1]
        run = image_tokens[used : used + count]
        if len(run) != count or run[-1] - run[0] != count - 1:
            raise ValueError(f"image of {merged[0]} x {merged[1]} tokens does not match the tokens")
        start, end = int(run[0]), int(run[-1]) + 1
        positions[done:start] = (np.arange(done, start) + shift)[:, None]
        positions[start:end, 0] = start + shift
        positions[start:end, 1:] = np.indices(merged).reshape(2, -1).T + start + shift
        shift += max(merged) - count
        done, used = end, used + count
    if used != len(image_tokens):
        raise ValueError(f"{len(image_tokens)} image tokens, but the grids fill {used}")
    positions[done:] = (np.arange(done, len(tokens)) + shift)[:, None]
    return positions


def _block_order(planes: Int[np.ndarray, "n h w"], merge_size: int) -> Int[np.ndarray, "n rows columns m m"]:
    n, height, width = planes.shape
    blocks = planes.reshape(n, height // merge_size, merge_size, width // merge_size, merge_size)
    return blocks.transpose(0, 1, 3, 2, 4)


def _fill_windows(window_of_patch: Int[np.ndarray, " V"], num_windows: int, capacity: int) -> WindowLayout:
    order = np.argsort(window_of_patch, kind="stable")
    counts = np.bincount(window_of_patch, minlength=num_windows)
    shift = _first_fit(counts, capacity) - (np.cumsum(counts) - counts)
    slots = np.empty(len(order), np.int32)
    slots[order] = np.arange(len(order)) + np.repeat(shift, counts)
    size = (slots.max(initial=-1) // capacity + 1) * capacity
    windows, segments = np.full(size, -1, np.int32), np.zeros(size, np.int32)
    windows[slots], segments[slots] = np.arange(len(order)), window_of_patch + 1
    return WindowLayout(windows.reshape(-1, capacity), segments.reshape(-1, capacity), slots)


def _first_fit(counts: Int[np.ndarray, " n"], capacity: int) -> Int[np.ndarray, " n"]:
    """The first slot of each window when each goes into the first row of `capacity` slots with room for it."""
    used, first = np.zeros(len(counts), np.int64), np.empty(len(counts), np.int64)
    for window, count in enumerate(counts):
        row = np.argmax(used + count <= capacity)
        first[window] = row * capacity + used[row]
        used[row] += count
    return first


def _concatenate(parts: Sequence[np.ndarray], empty: tuple[int, ...]) -> np.ndarray:
    return np.concatenate([np.empty(empty, np.int32), *parts]).astype(np.int32)
