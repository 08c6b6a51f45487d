"""Random scenes in which every solid is whole, apart from the others and well visible (host)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeVar

import numpy as np
from jaxtyping import Float64

from sif_jax.data.scenes.camera import Camera
from sif_jax.data.scenes.config import ScenesConfig
from sif_jax.data.scenes.render import Geometry, Scene, Surroundings, trace_pixels
from sif_jax.data.scenes.solids import COLOURS, KINDS, Kind, Size, Solid
from sif_jax.sif.boxes import Box

RADIUS_M: dict[Size, tuple[float, float]] = {"small": (0.30, 0.36), "large": (0.56, 0.66)}
# Height over radius; with it a large solid is larger than a small one of any kind in volume, width and height.
HEIGHT: dict[str, tuple[float, float]] = {
    "sphere": (2.0, 2.0),
    "box": (1.8, 2.0),
    "cylinder": (2.0, 2.4),
    "cone": (2.0, 2.2),
}
WIDTH: dict[str, float] = {"sphere": 1.0, "box": 0.85, "cylinder": 0.85, "cone": 1.0}
NEAREST_M, FARTHEST_M = 2.8, 6.8
GAP_M = 0.12
MARGIN_PX = 4
MOST_HIDDEN = 0.4
FLOORS = (
    ((0.66, 0.67, 0.70), (0.50, 0.51, 0.55)),
    ((0.72, 0.67, 0.60), (0.56, 0.51, 0.45)),
    ((0.60, 0.66, 0.64), (0.46, 0.52, 0.50)),
)
WALLS = ((0.78, 0.80, 0.84), (0.84, 0.80, 0.74), (0.74, 0.80, 0.80))

T = TypeVar("T")
Boxes = Float64[np.ndarray, "solids 4"]
Placed = tuple[Solid, Box]


def sample_scene(rng: np.random.Generator, config: ScenesConfig) -> tuple[Scene, Geometry]:
    """Draws the number of solids and the picture's size once, then until every solid is whole and well visible."""
    size_px = config.sizes_px[rng.integers(len(config.sizes_px))]
    low, high = config.num_solids
    num_solids = int(rng.integers(low, high + 1))
    while True:
        scene = _draw_scene(rng, size_px, num_solids)
        if scene is None:
            continue
        geometry = trace_pixels(scene)
        visible_px = np.bincount(geometry.instances.ravel(), minlength=num_solids + 1)[1:]
        fraction = visible_px / np.maximum(geometry.outline_px, 1)
        if (visible_px >= config.min_visible_px).all() and (fraction >= config.min_visible_fraction).all():
            return scene, geometry


def visible_boxes(geometry: Geometry, num_solids: int) -> Boxes:
    """Bounds of the visible pixels of each solid, xyxy in [0, 1]; x2 and y2 are the far sides of the last pixels."""
    h, w = geometry.instances.shape
    boxes = []
    for index in range(num_solids):
        visible = geometry.instances == index + 1
        rows, columns = np.flatnonzero(visible.any(1)), np.flatnonzero(visible.any(0))
        boxes.append((columns[0] / w, rows[0] / h, (columns[-1] + 1) / w, (rows[-1] + 1) / h))
    return np.array(boxes, np.float64).reshape(num_solids, 4)


def _draw_scene(rng: np.random.Generator, size_px: tuple[int, int], num_solids: int) -> Scene | None:
    camera = _draw_camera(rng, *size_px)
    placed: list[Placed] = []
    for (kind, colour), size in zip(_draw_names(rng, num_solids), _draw_sizes(rng, num_solids)):
        place = _place(rng, camera, kind, colour, size, placed)
        if place is None:
            return None
        placed.append(place)
    return Scene(camera, _draw_surroundings(rng), tuple(solid for solid, _ in placed))


def _draw_camera(rng: np.random.Generator, width_px: int, height_px: int) -> Camera:
    focal_px = rng.uniform(1.1, 1.3) * (width_px + height_px) / 2
    half_view = np.arctan(height_px / 2 / focal_px)
    return Camera(
        width_px=width_px,
        height_px=height_px,
        height_m=rng.uniform(1.9, 2.7),
        pitch=float(0.8 * half_view + np.radians(rng.uniform(0, 7))),
        focal_px=focal_px,
    )


def _draw_surroundings(rng: np.random.Generator) -> Surroundings:
    azimuth, elevation = np.radians(rng.uniform(-65, 65)), np.radians(rng.uniform(40, 62))
    floor = FLOORS[rng.integers(len(FLOORS))]
    return Surroundings(
        floor=floor,
        tile_m=float(rng.choice([0.0, 0.6, 0.9])),
        wall=WALLS[rng.integers(len(WALLS))],
        wall_m=rng.uniform(9.0, 12.0),
        light=(
            float(np.cos(elevation) * np.sin(azimuth)),
            float(np.sin(elevation)),
            float(-np.cos(elevation) * np.cos(azimuth)),
        ),
    )


def _draw_names(rng: np.random.Generator, num_solids: int) -> list[tuple[Kind, str]]:
    """(kind, colour) pairs, each at most once, from so few kinds and colours that several solids share one."""
    kinds = _some(rng, KINDS, 2 + num_solids // 3)
    colours = _some(rng, tuple(COLOURS), max(2, num_solids - 1))
    return _some(rng, [(kind, colour) for kind in kinds for colour in colours], num_solids)


def _draw_sizes(rng: np.random.Generator, num_solids: int) -> list[Size]:
    """At least one of each size."""
    sizes: list[Size] = ["small", "large"]
    return _some(rng, sizes + [sizes[rng.integers(2)] for _ in range(num_solids - 2)], num_solids)


def _some(rng: np.random.Generator, items: Sequence[T], count: int) -> list[T]:
    return [items[index] for index in rng.permutation(len(items))[:count]]


def _place(
    rng: np.random.Generator, camera: Camera, kind: Kind, colour: str, size: Size, others: list[Placed]
) -> Placed | None:
    """A solid whole in the picture, apart from the others and clear of them, or None when a dozen tries find no place."""
    for _ in range(12):
        solid = _draw_solid(rng, camera, kind, colour, size)
        if all(_are_apart(solid, other) for other, _ in others):
            place = solid, _outline_px(camera, solid)
            if _is_whole(camera, place[1]) and all(_are_clear(place, other) for other in others):
                return place
    return None


def _draw_solid(rng: np.random.Generator, camera: Camera, kind: Kind, colour: str, size: Size) -> Solid:
    low, high = zip(RADIUS_M[size], (NEAREST_M, FARTHEST_M), HEIGHT[kind], (-1, 1), (0, math.pi / 2))
    radius, depth, height, side, yaw = rng.uniform(np.array(low), np.array(high)).tolist()
    radius *= WIDTH[kind]
    reach = camera.width_px / 2 / camera.focal_px * depth - radius
    return Solid(kind, colour, size, x=side * reach, z=depth, radius=radius, height=radius * height, yaw=yaw)


def _outline_px(camera: Camera, solid: Solid) -> Box:
    u, v, _ = camera.project(solid.bounding_corners)
    return float(u.min()), float(v.min()), float(u.max()), float(v.max())


def _is_whole(camera: Camera, outline_px: Box) -> bool:
    x1, y1, x2, y2 = outline_px
    return min(x1, y1, camera.width_px - x2, camera.height_px - y2) >= MARGIN_PX


def _are_apart(first: Solid, second: Solid) -> bool:
    distance = math.hypot(first.x - second.x, first.z - second.z)
    return distance >= first.footprint_radius + second.footprint_radius + GAP_M


def _are_clear(first: Placed, second: Placed) -> bool:
    """Whether the nearer solid can leave enough of the farther one to be seen: spares the tracing of most other scenes."""
    (_, near), (_, far) = sorted((first, second), key=lambda place: place[0].z)
    width, height = min(near[2], far[2]) - max(near[0], far[0]), min(near[3], far[3]) - max(near[1], far[1])
    return max(width, 0) * max(height, 0) <= MOST_HIDDEN * (far[2] - far[0]) * (far[3] - far[1])
