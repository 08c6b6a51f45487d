"""Pictures small enough to embed: downscaled, then PNG or JPEG, whichever is smaller, as a data address (host)."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageOps, UnidentifiedImageError

from sif_jax.errors import InputError

MAX_SIDE = 420  # twice the width at which a trace shows it, for sharp screens and print


@dataclass(frozen=True)
class Picture:
    address: str
    width: int
    height: int


def read_picture(path: Path) -> Picture:
    try:
        with Image.open(path) as file:
            return embed(ImageOps.exif_transpose(file).convert("RGB"))
    except (FileNotFoundError, UnidentifiedImageError) as error:
        raise InputError("the image of a sample cannot be read", file=path, value=str(error)) from error


def embed(image: Image.Image) -> Picture:
    small = ImageOps.contain(image, (MAX_SIDE, MAX_SIDE)) if max(image.size) > MAX_SIDE else image
    png, jpeg = io.BytesIO(), io.BytesIO()
    small.save(png, "PNG", optimize=True)
    small.save(jpeg, "JPEG", quality=88, subsampling=0)
    kind, data = min(("png", png.getvalue()), ("jpeg", jpeg.getvalue()), key=lambda item: len(item[1]))
    return Picture(f"data:image/{kind};base64,{base64.b64encode(data).decode('ascii')}", *small.size)
