"""SIF rows over photographs that the scikit-image wheel holds, annotated by hand (io).

The motorcycle is a stereo pair of Middlebury 2014 with measured disparity, from which its depth map is made; the other
photographs have none.
"""

from __future__ import annotations

import importlib
import json
from importlib import resources
from pathlib import Path

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

from sif_jax.errors import InputError
from sif_jax.sif.boxes import from_pixels
from sif_jax.sif.depth_codec import encode_depth, normalise_depth
from sif_jax.sif.record import Record, write_records

DATASET = "photographs"
# Of scikit-image's down-sampled pair (its docstring): focal length and offset of the principal points in pixels.
FOCAL_PX, OFFSET_PX, BASELINE_M = 994.978, 31.086, 0.193001


def build_photographs(out_dir: str | Path) -> Path:
    """Writes `images/`, `depth/` and photographs.json, and returns the latter's path. Needs no network.

    Raises:
      InputError: scikit-image is not installed.
    """
    out_dir = Path(out_dir)
    for folder in ("images", "depth"):
        (out_dir / folder).mkdir(parents=True, exist_ok=True)
    text = resources.files("sif_jax.data.photographs").joinpath("annotations.json").read_text()
    records = [row for name, rows in json.loads(text).items() for row in _records(out_dir, name, rows)]
    write_records(out_dir / "photographs.json", records)
    return out_dir / "photographs.json"


def _records(out_dir: Path, name: str, rows: list[dict]) -> list[Record]:
    rgb, depth_m = _photograph(name)
    image, depth_image = f"images/{name}.png", None if depth_m is None else f"depth/{name}.png"
    Image.fromarray(rgb).save(out_dir / image)
    if depth_m is not None:
        Image.fromarray(encode_depth(normalise_depth(depth_m))).save(out_dir / str(depth_image))
    height, width = rgb.shape[:2]
    return [
        Record(
            dataset=DATASET,
            image=image,
            depth_image=depth_image,
            problem=row["problem"],
            gold_boxes=_boxes(row["boxes_px"], width, height),
            response=row["response"],
        )
        for row in rows
    ]


def _boxes(boxes_px: list[list[int]], width: int, height: int) -> tuple[tuple[float, float, float, float], ...]:
    boxes = from_pixels(np.array(boxes_px, np.float64), (width, height)).round(3)
    return tuple((x1, y1, x2, y2) for x1, y1, x2, y2 in boxes.tolist())


def _photograph(name: str) -> tuple[UInt8[np.ndarray, "h w 3"], Float[np.ndarray, "h w"] | None]:
    try:
        photographs = importlib.import_module("skimage.data")
    except ModuleNotFoundError as error:
        raise InputError("the photographs need scikit-image", fix="pip install 'sif_jax[demo]'") from error
    if name == "motorcycle":
        left, _, disparity_px = photographs.stereo_motorcycle()
        return left, stereo_depth(disparity_px)
    return getattr(photographs, name)(), None


def stereo_depth(disparity_px: Float[np.ndarray, "h w"]) -> Float[np.ndarray, "h w"]:
    """Depth in metres. Pixels without disparity take the farther of their nearest measured neighbours in the row.

    What the right camera does not see lies behind what hides it, hence the farther one.
    """
    measured = np.isfinite(disparity_px)
    before = _filled_from_left(disparity_px, measured)
    after = _filled_from_left(disparity_px[:, ::-1], measured[:, ::-1])[:, ::-1]
    return FOCAL_PX * BASELINE_M / (np.fmin(before, after) + OFFSET_PX)


def _filled_from_left(values: Float[np.ndarray, "h w"], known: np.ndarray) -> Float[np.ndarray, "h w"]:
    """Each value that is not known becomes the last known one to its left, or NaN where there is none."""
    last = np.maximum.accumulate(np.where(known, np.arange(values.shape[1]), 0), axis=1)
    filled = np.take_along_axis(values, last, axis=1)
    return np.where(np.isfinite(filled), filled, np.nan)
