"""Mean depth inside many boxes of many maps, from exact two-level integral images (pure).

Depths become whole numbers of 2^-20, and sums stay whole numbers, so that a mean differs from the exact one by at most
2^-21 and float32's rounding, however large the box. Sums are kept at every eighth row and column: the pixels above and
left of a corner are the whole tiles there, the rest of their tile row, the rest of their tile column, and the pixels
of the corner's own tile.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, UInt32

TILE = 8
_ONE = 2**20  # sums along one row or column of at most 4095 pixels stay below 2^32
_LOW_BITS = 14
_BOXES_AT_ONCE = 32768


class _Tables(NamedTuple):
    depth: Float[Array, "map H W"]
    left: UInt32[Array, "tile_x map H"]  # sum of a row's pixels left of a tile
    above: UInt32[Array, "tile_y map W"]  # sum of a column's pixels above a tile
    corner: UInt32[Array, "tile_y plane tile_x map"]  # sum of the pixels above and left of a tile, high and low bits


def box_means(
    depth_maps: Float[Array, "map H W"], map_index: Int[Array, " box"], windows: Int[Array, "box 4"]
) -> Float[Array, " box"]:
    """Mean of each window (y1, x1, y2, x2, ends exclusive) of its map; 0 for an empty one. 8 divides H and W.

    Depths outside [0, 1] are clipped.
    """
    tables = _tables(depth_maps)
    sums = lax.map(lambda box: _window_sum(tables, *box), (map_index, windows), batch_size=_BOXES_AT_ONCE)
    num_pixels = (windows[:, 2] - windows[:, 0]) * (windows[:, 3] - windows[:, 1])
    return sums / jnp.maximum(num_pixels, 1)


def _tables(depth: Float[Array, "map H W"]) -> _Tables:
    num_maps, H, W = depth.shape
    pixels = _whole(depth)
    left = _running_sum(jnp.moveaxis(pixels.reshape(num_maps, H, W // TILE, TILE).sum(axis=3), 2, 0))
    above = _running_sum(jnp.moveaxis(pixels.reshape(num_maps, H // TILE, TILE, W).sum(axis=2), 1, 0))
    tile_rows = _split(left).reshape(2, -1, num_maps, H // TILE, TILE).sum(axis=4)
    return _Tables(depth, left, above, _running_sum(jnp.moveaxis(tile_rows, 3, 0)))


def _window_sum(tables: _Tables, index: Int[Array, ""], window: Int[Array, "4"]) -> Float[Array, ""]:
    y1, x1, y2, x2 = window
    corners = jax.vmap(partial(_corner_sum, tables, index))(jnp.stack([y2, y1, y2, y1]), jnp.stack([x2, x2, x1, x1]))
    # The planes wrap around at 2^32; their differences do not.
    high, low = (corners[0] - corners[1] - corners[2] + corners[3]).astype(jnp.int32)
    high, low = high + (low >> _LOW_BITS), low & (2**_LOW_BITS - 1)
    return (high.astype(jnp.float32) * 2**_LOW_BITS + low.astype(jnp.float32)) / _ONE


def _corner_sum(tables: _Tables, index: Int[Array, ""], y: Int[Array, ""], x: Int[Array, ""]) -> UInt32[Array, "plane"]:
    """Sum of the map's pixels in rows before y and columns before x, as high and low bits."""
    tile_y, tile_x = y // TILE, x // TILE
    in_y, in_x = jnp.arange(TILE) < y % TILE, jnp.arange(TILE) < x % TILE
    # At the far border slices are clamped into the array, and nothing of them is in.
    left = lax.dynamic_slice(tables.left, (tile_x, index, tile_y * TILE), (1, 1, TILE)).ravel()
    above = lax.dynamic_slice(tables.above, (tile_y, index, tile_x * TILE), (1, 1, TILE)).ravel()
    own = lax.dynamic_slice(tables.depth, (index, tile_y * TILE, tile_x * TILE), (1, TILE, TILE))[0]
    return (
        tables.corner[tile_y, :, tile_x, index]
        + jnp.where(in_y[None], _split(left), 0).sum(axis=1)
        + jnp.where(in_x[None], _split(above), 0).sum(axis=1)
        + _split(jnp.where(in_y[:, None] & in_x[None], _whole(own), 0).sum())
    )


def _whole(depth: Float[Array, "*shape"]) -> UInt32[Array, "*shape"]:
    return jnp.round(jnp.clip(depth, 0, 1) * _ONE).astype(jnp.uint32)


def _split(sums: UInt32[Array, "*shape"]) -> UInt32[Array, "plane *shape"]:
    return jnp.stack([sums >> _LOW_BITS, sums & (2**_LOW_BITS - 1)])


def _running_sum(values: UInt32[Array, "n *shape"]) -> UInt32[Array, "n+1 *shape"]:
    """Sums of what stands before each index, and of all. A scan: XLA's cumsum takes n log n operations on CPUs."""
    total, before = lax.scan(lambda total, value: (total + value, total), jnp.zeros_like(values[0]), values)
    return jnp.concatenate([before, total[None]])
