"""Images to normalised patches, bit for bit as transformers' `Qwen2VLImageProcessorPil` (host).

Order of work: RGB (transparency on white), `smart_resize`, bicubic uint8 resize, then rescale and normalise. On uint8
the last two are a table of 256 values per channel, so every pixel is looked up, not computed.
"""

from __future__ import annotations

import json
import math
import struct
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float32, UInt8
from PIL import Image, ImageOps

from sif_jax.errors import InputError

MAX_ASPECT_RATIO = 200
CONFIG_FILE = "preprocessor_config.json"
RECORDED = "trained_with_this_size"  # marks the pixel limits of a config as those of a training, not a default
PROCESSOR_FILE = "processor_config.json"  # where transformers 5 nests the same keys
# What Pillow raises on a damaged file, format by format.
_UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, TypeError, struct.error, zlib.error)


class PatchedImage(NamedTuple):
    """`patches` in merge-block raster order; `grid_hw` counts patches, so len(patches) = h * w."""

    patches: Float32[np.ndarray, "P D"]
    grid_hw: tuple[int, int]


@dataclass(frozen=True)
class ImageProcessor:
    min_pixels: int = 56 * 56
    max_pixels: int = 28 * 28 * 1280
    patch_size: int = 14
    temporal_patch_size: int = 2
    merge_size: int = 2
    image_mean: tuple[float, ...] = (0.48145466, 0.4578275, 0.40821073)
    image_std: tuple[float, ...] = (0.26862954, 0.26130258, 0.27577711)
    rescale_factor: float = 1 / 255
    resample: int = Image.Resampling.BICUBIC

    @classmethod
    def from_directory(cls, directory: str | Path, **overrides: Any) -> ImageProcessor:
        """Read `preprocessor_config.json`; where the checkpoint has none, the published Qwen2.5-VL values hold."""
        raw, path = _read_config(Path(directory))
        settings = {**_settings(raw, path), **overrides}
        if not 0 < settings.get("min_pixels", 1) <= settings.get("max_pixels", math.inf):
            sizes = {key: settings[key] for key in ("min_pixels", "max_pixels")}
            raise InputError(
                "no image size is possible", file=path, value=sizes, expected="0 < min_pixels <= max_pixels"
            )
        return cls(**settings)

    def save(self, directory: str | Path, *, trained: bool = False) -> None:
        """Write `preprocessor_config.json`; `trained` records that the checkpoint was trained with these pixel limits."""
        sizes = {"shortest_edge": self.min_pixels, "longest_edge": self.max_pixels}
        raw = {
            "image_processor_type": "Qwen2VLImageProcessor",
            **asdict(self),
            "size": sizes,
            "resample": int(self.resample),
        }
        if trained:
            raw[RECORDED] = True
        (Path(directory) / CONFIG_FILE).write_text(json.dumps(raw, indent=2) + "\n")

    def patches(self, image: Image.Image | np.ndarray) -> PatchedImage:
        rgb = _to_rgb(image)
        height, width = smart_resize(
            *rgb.shape[:2],
            factor=self.patch_size * self.merge_size,
            min_pixels=self.min_pixels,
            max_pixels=self.max_pixels,
        )
        if rgb.shape[:2] != (height, width):
            rgb = np.asarray(Image.fromarray(rgb).resize((width, height), resample=self.resample))
        return PatchedImage(self._patchify(rgb), (height // self.patch_size, width // self.patch_size))

    def _patchify(self, rgb: UInt8[np.ndarray, "h w 3"]) -> Float32[np.ndarray, "P D"]:
        size, merge = self.patch_size, self.merge_size
        rows, columns = rgb.shape[0] // size // merge, rgb.shape[1] // size // merge
        blocks = rgb.reshape(rows, merge, size, columns, merge, size, 3).transpose(6, 0, 3, 1, 4, 2, 5)
        num_patches = rows * columns * merge**2
        patches = np.empty((num_patches, 3, self.temporal_patch_size, size**2), np.float32)
        for channel, (table, values) in enumerate(zip(self._normalised, blocks.reshape(3, num_patches, size**2))):
            # "clip" is take's fast mode; an index of uint8 into 256 values is never clipped.
            patches[:, channel] = table.take(values, mode="clip")[:, None]
        return patches.reshape(num_patches, -1)

    @cached_property
    def _normalised(self) -> Float32[np.ndarray, "3 256"]:
        """Each uint8 value after rescaling in float64 and normalising in float32, per channel."""
        rescaled = (np.arange(256, dtype=np.float64) * self.rescale_factor).astype(np.float32)
        mean, std = np.array(self.image_mean, np.float32), np.array(self.image_std, np.float32)
        return (rescaled - mean[:, None]) / std[:, None]


def recorded_pixels(directory: str | Path) -> dict[str, int] | None:
    """The min_pixels and max_pixels that a checkpoint was trained with, where it records them."""
    raw, path = _read_config(Path(directory))
    if not raw.get(RECORDED):
        return None
    settings = _settings(raw, path)
    return {name: settings[name] for name in ("min_pixels", "max_pixels")}


def smart_resize(height: int, width: int, *, factor: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """Height and width divisible by `factor`, area in [min_pixels, max_pixels], nearly the same aspect ratio."""
    if max(height, width) > MAX_ASPECT_RATIO * min(height, width):
        raise InputError(
            "the image is too narrow",
            value=f"{width}x{height}",
            expected=f"an aspect ratio of at most {MAX_ASPECT_RATIO}",
            fix="crop it",
        )
    resized = round(height / factor) * factor, round(width / factor) * factor
    if math.prod(resized) > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        resized = (max(factor, math.floor(side / shrink / factor) * factor) for side in (height, width))
    elif math.prod(resized) < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        resized = (math.ceil(side * grow / factor) * factor for side in (height, width))
    resized_height, resized_width = resized
    return resized_height, resized_width


def load_image(path: str | Path) -> Image.Image:
    """The upright RGB image of a file (EXIF rotation applied), as transformers' `load_image`.

    Raises:
      InputError: the file is missing, truncated, not an image, or larger than Pillow's bomb limit (179 million pixels).
    """
    try:
        with Image.open(path) as image:
            ImageOps.exif_transpose(image, in_place=True)
            return image.convert("RGB")
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        raise InputError("no such image", file=path, fix="check image_root and the row's path") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise InputError(f"the image is too large: {error}", file=path, fix="downscale it") from None
    except _UNREADABLE as error:
        raise InputError(f"the image cannot be read: {error}", file=path, fix="replace the file") from None


def _to_rgb(image: Image.Image | np.ndarray) -> UInt8[np.ndarray, "h w 3"]:
    if isinstance(image, np.ndarray):
        return _array_to_rgb(image)
    if "A" in image.getbands() or image.info.get("transparency") is not None:
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))


def _array_to_rgb(image: np.ndarray) -> UInt8[np.ndarray, "h w 3"]:
    channels = image.shape[2] if image.ndim == 3 else 1
    if image.dtype != np.uint8 or image.ndim not in (2, 3) or channels not in (1, 3, 4):
        raise InputError(
            "not an image array",
            value=f"{image.dtype}{list(image.shape)}",
            expected="uint8 [h, w], [h, w, 1], [h, w, 3] or [h, w, 4]",
            fix="scale the values to 0 ... 255 and put the channels last",
        )
    if channels == 1:
        return np.repeat(image.reshape(*image.shape[:2], 1), 3, axis=2)
    if channels == 4:
        alpha = image[..., 3:] / 255
        return np.round(alpha * image[..., :3] + (1 - alpha) * 255).astype(np.uint8)
    return image


def _read_config(directory: Path) -> tuple[Mapping[str, Any], Path]:
    path = directory / CONFIG_FILE
    nested = not path.is_file() and (directory / PROCESSOR_FILE).is_file()
    if nested:
        path = directory / PROCESSOR_FILE
    try:
        raw = json.loads(path.read_text()) if path.is_file() else {}
    except json.JSONDecodeError as error:
        raise InputError(f"malformed JSON at line {error.lineno}: {error.msg}", file=path) from None
    return (raw.get("image_processor", {}) if nested else raw), path


def _settings(raw: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """The keys that matter; sizes as `min_pixels`, `max_pixels` or as `size: {shortest_edge, longest_edge}`."""
    for switch in ("do_resize", "do_rescale", "do_normalize", "do_convert_rgb"):
        if raw.get(switch) is False:
            raise InputError(f"{switch} cannot be switched off", file=path, value=False, expected="true")
    size = raw.get("size") or {}
    old_names = {"shortest_edge": "min_pixels", "longest_edge": "max_pixels"}
    sizes = {old_names.get(key, key): value for key, value in size.items()}
    settings = {**sizes, **{key: value for key, value in raw.items() if value is not None}}
    known = {field.name for field in fields(ImageProcessor)}
    return {key: tuple(v) if isinstance(v, list) else v for key, v in settings.items() if key in known}
