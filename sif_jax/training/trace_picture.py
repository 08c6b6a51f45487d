"""A trace drawn on its image and depth map, later steps in darker red, gold boxes in green (host)."""

from __future__ import annotations

from collections.abc import Sequence
from math import isnan
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, ImageOps

from sif_jax.errors import InputError
from sif_jax.models.qwen2_5_vl.image_processor import load_image
from sif_jax.sif.boxes import Box
from sif_jax.sif.grammar import Trace, parse

Colour = tuple[int, int, int]

SIDE = 384  # longest side of a panel, pixels
GAP = 6
MAX_STEPS, MAX_BOXES = 8, 8  # a looping model must not hide the picture
GOLD: Colour = (0, 163, 82)
FIRST_STEP: Colour = (255, 205, 120)
LAST_STEP: Colour = (150, 0, 24)


def draw_trace(trace: Trace, gold_boxes: Sequence[Box], image: Path, depth_image: Path | None) -> Image.Image:
    """Areas are numbered by step on the image, and carry the depth that the model claims on the depth map beside it."""
    steps = trace.areas[:MAX_STEPS]
    areas = [
        (pair.box_norm, shade(number, len(steps)), str(number + 1), "?" if isnan(pair.depth) else f"{pair.depth:.2f}")
        for number, area in enumerate(steps)
        for pair in area[:MAX_BOXES]
    ]
    gold = [(box, GOLD, "") for box in gold_boxes]
    panels = [_panel(image, [*gold, *((box, colour, step) for box, colour, step, _ in areas)])]
    if depth_image is not None:
        panels.append(_panel(depth_image, [*gold, *((box, colour, depth) for box, colour, _, depth in areas)]))
    return _beside(panels)


def save_traces(completions: Sequence[str], images: Sequence[str], file: Path | None) -> list[Path]:
    """Draw each completion on its image (and depth map, the second); several go to FILE-1, FILE-2, …; None: nowhere.

    Raises:
      InputError: the picture cannot be written.
    """
    if file is None:
        return []
    image, depth_image = Path(images[0]), Path(images[1]) if len(images) > 1 else None
    numbered = [file.with_stem(f"{file.stem}-{number}") for number in range(1, len(completions) + 1)]
    files = [file] if len(completions) == 1 else numbered
    for completion, path in zip(completions, files):
        picture = draw_trace(parse(completion), (), image, depth_image)
        try:
            picture.save(path)
        except (OSError, ValueError) as error:  # Pillow's ValueError: no format of this name
            raise InputError(
                f"cannot write the picture ({error})", file=path, expected="a name such as trace.png", fix="set overlay"
            ) from None
    return files


def shade(step: int, num_steps: int) -> Colour:
    """From light at the first step to dark at the last; a single step is the last."""
    part = step / (num_steps - 1) if num_steps > 1 else 1.0
    red, green, blue = (round(light + part * (dark - light)) for light, dark in zip(FIRST_STEP, LAST_STEP))
    return red, green, blue


def _panel(path: Path, frames: Sequence[tuple[Box, Colour, str]]) -> Image.Image:
    panel = ImageOps.contain(load_image(path), (SIDE, SIDE))
    canvas, font = ImageDraw.Draw(panel), ImageFont.load_default(14)
    for (x1, y1, x2, y2), colour, label in frames:
        width, height = panel.width - 1, panel.height - 1
        frame = (round(x1 * width), round(y1 * height), round(x2 * width), round(y2 * height))
        canvas.rectangle(frame, outline=colour, width=3)
        canvas.text((frame[0] + 5, frame[1] + 3), label, fill="black", font=font, stroke_width=2, stroke_fill="white")
    return panel


def _beside(panels: Sequence[Image.Image]) -> Image.Image:
    width = sum(panel.width for panel in panels) + GAP * (len(panels) - 1)
    picture, left = Image.new("RGB", (width, max(panel.height for panel in panels)), "white"), 0
    for panel in panels:
        picture.paste(panel, (left, 0))
        left += panel.width + GAP
    return picture
