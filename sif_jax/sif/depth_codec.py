"""Depth maps in images, in one code of one polarity: near = 0, far = 1 (host).

Colour code: matplotlib's `Spectral_r` of the min-max-scaled inverse depth, so the warm end (index 255) is near and index
i decodes as 1 - i/255. A grey image holds the same inverse depth, white = near, and decodes as 1 - v/255; the authors'
release reads grey as v/255, the opposite polarity.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from jaxtyping import Float, Int32, Integer, Shaped, UInt8
from PIL import Image
from scipy.spatial import KDTree

from sif_jax.errors import InputError
from sif_jax.sif.boxes import Box, Size

# ColorBrewer's Spectral with 11 classes, reversed as in `Spectral_r`.
_ANCHORS = np.array(
    [
        (94, 79, 162),
        (50, 136, 189),
        (102, 194, 165),
        (171, 221, 164),
        (230, 245, 152),
        (255, 255, 191),
        (254, 224, 139),
        (253, 174, 97),
        (244, 109, 67),
        (213, 62, 79),
        (158, 1, 66),
    ]
)
# Channels of a grey JPEG differ by rounding.
_GREY_TOLERANCE = 2
# Mean RGB distance to the code: below 4 for a smooth map as JPEG, 20 and more when JPEG smears edges everywhere, above
# 60 for photographs and for swapped channels.
_MAX_COLOUR_DISTANCE = 16.0


def _spectral_r() -> UInt8[np.ndarray, "256 3"]:
    """The colour table: linear between the anchors, in integers, rounded down as matplotlib's bytes are."""
    low, share = np.divmod(np.arange(256) * (len(_ANCHORS) - 1), 255)
    high = np.minimum(low + 1, len(_ANCHORS) - 1)
    share = share[:, None]
    return ((_ANCHORS[low] * (255 - share) + _ANCHORS[high] * share) // 255).astype(np.uint8)


SPECTRAL_R = _spectral_r()
_NEAREST = KDTree(SPECTRAL_R)


def normalise_depth(depth_m: Float[np.ndarray, "h w"]) -> Float[np.ndarray, "h w"]:
    """Min-max-scaled inverse depth, d = 1 - (1/z - min)/(max - min); 0.5 everywhere for a constant map.

    Raises:
      InputError: a depth is not positive (infinity, as of the sky, is legal).
    """
    if not (depth_m > 0).all():
        raise InputError("a depth is not positive", value=float(np.min(depth_m)), expected="metres above 0")
    inverse = 1 / np.asarray(depth_m, np.float64)
    near, far = inverse.max(), inverse.min()
    if near == far:
        return np.full(depth_m.shape, 0.5, np.float32)
    return ((near - inverse) / (near - far)).astype(np.float32)


def encode_depth(depth_norm: Float[np.ndarray, "h w"]) -> UInt8[np.ndarray, "h w 3"]:
    """RGB colours; decoding gives the depth back within half a level, 0.5/255.

    Raises:
      InputError: a depth is NaN or outside [0, 1].
    """
    if not ((depth_norm >= 0) & (depth_norm <= 1)).all():
        raise InputError("a depth is outside [0, 1]", fix="normalise_depth gives depths in [0, 1]")
    return SPECTRAL_R[np.rint((1 - depth_norm) * 255).astype(np.uint8)]


def decode_depth(image: Integer[np.ndarray, "h w *channel"]) -> Float[np.ndarray, "h w"]:
    """Depth in [0, 1] of a grey image (8 or 16 bits) or of an RGB image, grey or in the colour code.

    Raises:
      InputError: the colours are not those of the code, beyond what JPEG does to them.
    """
    if image.ndim == 2:
        return (1 - image / np.iinfo(image.dtype).max).astype(np.float32)
    rgb = image[..., :3].astype(np.int32)
    if (rgb.max(axis=-1) - rgb.min(axis=-1)).max() <= _GREY_TOLERANCE:
        return (1 - rgb.mean(axis=-1) / 255).astype(np.float32)
    packed = (rgb[..., 0] << 16 | rgb[..., 1] << 8 | rgb[..., 2]).ravel()
    colours, inverse, counts = np.unique(packed, return_inverse=True, return_counts=True)
    distances, indices = map(
        np.asarray, _NEAREST.query(np.stack([colours >> 16, colours >> 8 & 255, colours & 255], -1))
    )
    mean_distance = float(distances @ counts / counts.sum())
    if mean_distance > _MAX_COLOUR_DISTANCE:
        raise InputError(
            "the image is not a depth map in the Spectral_r code",
            value=round(mean_distance, 1),
            expected=f"a mean colour distance of at most {_MAX_COLOUR_DISTANCE}",
            fix="save depth maps as PNG, and check that red and blue are not swapped",
        )
    return (1 - indices[inverse].reshape(rgb.shape[:2]) / 255).astype(np.float32)


def read_depth(path: str | Path, expected_size: Size | None = None) -> Float[np.ndarray, "h w"]:
    """The depth map of an image file.

    Raises:
      InputError: the file is missing, damaged, no depth map, or not of `expected_size` (width, height).
    """
    try:
        with Image.open(path) as image:
            pixels = _pixels(image)
            size = image.size
    # Pillow raises SyntaxError and ValueError, too, on damaged files.
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        reason = "no such file" if isinstance(error, FileNotFoundError) else str(error)
        raise InputError(f"cannot read the depth image ({reason})", file=path, fix="make the depth map anew") from error
    if expected_size is not None and size != expected_size:
        raise InputError(
            "the depth image has the wrong size",
            file=path,
            value=size,
            expected=f"the size of its RGB image, {expected_size}",
            fix="make the depth map anew from this image",
        )
    try:
        return decode_depth(pixels)
    except InputError as error:
        raise InputError(str(error), file=path) from error


def _pixels(image: Image.Image) -> Shaped[np.ndarray, "h w *channel"]:
    if image.mode in ("I;16", "I;16B", "I;16L"):
        return np.asarray(image).astype(np.uint16)
    return np.asarray(image.convert("L" if image.mode in ("1", "L", "LA") else "RGB"))


def box_mean_depth(depth_norm: Float[np.ndarray, "h w"], box_norm: Box) -> float | None:
    """Mean depth of the pixels whose centre lies in the box, or of the pixel at the box's centre if there is none.

    None if the box is empty, inverted or misses the image.
    """
    rows, columns = depth_norm.shape
    y1, x1, y2, x2 = pixel_windows(np.array(box_norm), np.array((columns, rows))).tolist()
    covered = depth_norm[y1:y2, x1:x2]
    return float(covered.mean(dtype=np.float64)) if covered.size else None


def pixel_windows(
    boxes_norm: Float[np.ndarray, "*boxes 4"], sizes: Integer[np.ndarray, "*#boxes 2"]
) -> Int32[np.ndarray, "*boxes 4"]:
    """Rows and columns (y1, x1, y2, x2; ends exclusive) of each box's pixels; all 0 if `box_mean_depth` has none."""
    corners = np.clip(boxes_norm, 0, 1)
    low, high = corners[..., :2], corners[..., 2:]
    # The pixels i with low <= (i + 0.5)/size <= high; the tolerance keeps a centre on the border inside.
    first, last = np.ceil(low * sizes - 0.5 - 1e-9), np.floor(high * sizes - 0.5 + 1e-9)
    middle = np.minimum(np.floor((low + high) / 2 * sizes), sizes - 1)
    first, last = np.where(first > last, middle, (first, last))
    windows = np.concatenate([first[..., ::-1], last[..., ::-1] + 1], axis=-1)
    return np.where((low < high).all(axis=-1, keepdims=True), windows, 0).astype(np.int32)
