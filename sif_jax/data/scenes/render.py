"""Ray casting of a scene: exact depth and instances, then shading, cast shadows and anti-aliased edges (host)."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Bool, Float, Float32, Int64, UInt8

from sif_jax.data.scenes.camera import Camera
from sif_jax.data.scenes.solids import COLOURS, Solid

Colour = tuple[float, float, float]

AMBIENT = 0.46
CONTACT_REACH_M = 0.16
EDGE_CONTRAST = 0.06
# Rotated grid: four points of a pixel, each in its own row and column.
SUBPIXELS = ((-0.125, -0.375), (0.375, -0.125), (0.125, 0.375), (-0.375, 0.125))


@dataclass(frozen=True)
class Surroundings:
    """A floor, chequered if `tile_m` > 0, a wall at z = `wall_m` and the unit vector towards a far light."""

    floor: tuple[Colour, Colour]
    tile_m: float
    wall: Colour
    wall_m: float
    light: tuple[float, float, float]


@dataclass(frozen=True)
class Scene:
    camera: Camera
    surroundings: Surroundings
    solids: tuple[Solid, ...]


@dataclass(frozen=True)
class Geometry:
    """What each ray meets: where, at which depth along the optical axis, and 1 + the solid's index (0: floor or wall).

    `outline_px` counts for each solid the rays that would meet it if it stood alone.
    """

    points: Float32[np.ndarray, "3 *rays"]
    depth_m: Float32[np.ndarray, "*rays"]
    instances: UInt8[np.ndarray, "*rays"]
    outline_px: Int64[np.ndarray, " solids"]


def trace_pixels(scene: Scene) -> Geometry:
    """Geometry of every pixel centre, as [height, width] arrays."""
    shape = scene.camera.height_px, scene.camera.width_px
    return _reshaped(_trace(scene, *_pixel_centres(scene.camera)), *shape)


def paint(scene: Scene, geometry: Geometry) -> UInt8[np.ndarray, "h w 3"]:
    """The picture: one sample a pixel, four where the picture changes from a pixel to its neighbour."""
    u, v = _pixel_centres(scene.camera)
    shape = geometry.depth_m.shape
    rgb = _shade(scene, u, v, _reshaped(geometry, -1))
    edges = np.flatnonzero(_edges(rgb.reshape(3, *shape)))
    offset_u, offset_v = np.array(SUBPIXELS, np.float32).T
    fine_u = (u[edges, None] + offset_u).ravel()
    fine_v = (v[edges, None] + offset_v).ravel()
    fine = _shade(scene, fine_u, fine_v, _trace(scene, fine_u, fine_v))
    rgb[:, edges] = fine.reshape(3, -1, len(SUBPIXELS)).mean(2)
    return (np.clip(rgb, 0, 1) * 255 + 0.5).astype(np.uint8).T.reshape(*shape, 3)


def _reshaped(seen: Geometry, *shape: int) -> Geometry:
    return replace(
        seen,
        points=seen.points.reshape(3, *shape),
        depth_m=seen.depth_m.reshape(shape),
        instances=seen.instances.reshape(shape),
    )


def _pixel_centres(camera: Camera) -> tuple[Float32[np.ndarray, " n"], Float32[np.ndarray, " n"]]:
    u = np.arange(camera.width_px, dtype=np.float32) + np.float32(0.5)
    v = np.arange(camera.height_px, dtype=np.float32) + np.float32(0.5)
    return np.tile(u, camera.height_px), np.repeat(v, camera.width_px)


def _trace(scene: Scene, u: Float32[np.ndarray, " n"], v: Float32[np.ndarray, " n"]) -> Geometry:
    directions = scene.camera.ray_directions(u, v)
    depth_m = _background_depth(scene, directions)
    instances = np.zeros(u.shape, np.uint8)
    outline_px = np.zeros(len(scene.solids), np.int64)
    for index, solid in enumerate(scene.solids):
        near = _within(scene.camera, solid.bounding_corners, u, v)
        t_in, t_out = solid.ray_interval(scene.camera.origin, directions.take(near, axis=1))
        hit = t_in < t_out
        outline_px[index] = hit.sum()
        in_front = hit & (t_in < depth_m[near])
        depth_m[near[in_front]] = t_in[in_front]
        instances[near[in_front]] = index + 1
    return Geometry(scene.camera.origin + depth_m * directions, depth_m, instances, outline_px)


def _background_depth(scene: Scene, directions: Float32[np.ndarray, "3 n"]) -> Float32[np.ndarray, " n"]:
    with np.errstate(divide="ignore"):
        to_floor = np.float32(-scene.camera.height_m) / directions[1]
        to_wall = np.float32(scene.surroundings.wall_m) / directions[2]
    return np.minimum(np.where(to_floor > 0, to_floor, np.float32(np.inf)), to_wall)


def _within(
    camera: Camera, corners: Float[np.ndarray, "3 n"], u: Float32[np.ndarray, " m"], v: Float32[np.ndarray, " m"]
) -> Int64[np.ndarray, " k"]:
    """Which image points lie in the rectangle around the projected corners; the points come pixel row by pixel row."""
    corner_u, corner_v, _ = camera.project(corners)
    # Subpixels of a row are in no order, but all of them lie on one side of a whole number.
    rows = np.array([np.floor(corner_v.min()) - 1, np.ceil(corner_v.max()) + 1], np.float32)
    first, last = np.searchsorted(v, rows)
    columns = u[first:last]
    return first + np.flatnonzero((columns >= corner_u.min() - 1) & (columns <= corner_u.max() + 1))


def _shade(
    scene: Scene, u: Float32[np.ndarray, " n"], v: Float32[np.ndarray, " n"], seen: Geometry
) -> Float32[np.ndarray, "3 n"]:
    """Lambert's law with one far light, an ambient part that fades where solids touch the floor, and cast shadows."""
    points = seen.points
    light = np.array(scene.surroundings.light, np.float32)[:, None]
    on_floor = (seen.instances == 0) & (points[1] < 1e-3)
    albedo = _background_albedo(scene.surroundings, points, on_floor)
    diffuse = np.where(on_floor, light[1], np.maximum(-light[2], 0))
    upward = on_floor.astype(np.float32)
    for index, solid in enumerate(scene.solids):
        mine = np.flatnonzero(seen.instances == index + 1)
        normals = solid.normals(points.take(mine, axis=1))
        albedo[:, mine] = np.array(COLOURS[solid.colour], np.float32)[:, None]
        diffuse[mine] = np.maximum((normals * light).sum(0), 0)
        upward[mine] = normals[1]
    ambient = np.float32(AMBIENT) * (np.float32(0.85) + np.float32(0.15) * upward)
    for index, solid in enumerate(scene.solids):
        near = _within(scene.camera, _shadow_corners(solid, light), u, v)
        near = near[(diffuse[near] > 0) & (seen.instances[near] != index + 1)]
        diffuse[near[_is_shadowed(solid, points.take(near, axis=1), light)]] = 0
        foot = _within(scene.camera, _foot_corners(solid), u, v)
        foot = foot[on_floor[foot]]
        ambient[foot] *= _openness(solid, points.take(foot, axis=1))
    return albedo * (ambient + np.float32(1 - AMBIENT) * diffuse)


def _background_albedo(
    surroundings: Surroundings, points: Float32[np.ndarray, "3 n"], on_floor: Bool[np.ndarray, " n"]
) -> Float32[np.ndarray, "3 n"]:
    x, y, z = points
    first, second = (np.array(tone, np.float32)[:, None] for tone in surroundings.floor)
    if surroundings.tile_m > 0:
        tile = np.float32(surroundings.tile_m)
        tiles = (np.floor(x / tile) + np.floor(z / tile)).astype(np.int32)
        mix = (tiles & 1).astype(np.float32)
    else:
        mix = np.clip(z / np.float32(surroundings.wall_m), 0, 1)
    floor = first + (second - first) * mix
    wall = np.array(surroundings.wall, np.float32)[:, None] * (1 - np.float32(0.05) * np.minimum(y, np.float32(4)))
    return np.where(on_floor, floor, wall)


def _shadow_corners(solid: Solid, light: Float32[np.ndarray, "3 1"]) -> Float[np.ndarray, "3 16"]:
    """Corners around the solid and the shadow that it casts on the floor."""
    corners = solid.bounding_corners
    return np.concatenate([corners, corners - light * (corners[1] / light[1])], axis=1)


def _foot_corners(solid: Solid) -> Float[np.ndarray, "3 8"]:
    """Corners around the floor where the solid takes some of the ambient light."""
    foot = np.array([[solid.x], [0.0], [solid.z]])
    reach = 1 + 4 * CONTACT_REACH_M / solid.radius
    return foot + (solid.bounding_corners - foot) * np.array([[reach], [0.0], [reach]])


def _is_shadowed(
    solid: Solid, points: Float32[np.ndarray, "3 n"], light: Float32[np.ndarray, "3 1"]
) -> Bool[np.ndarray, " n"]:
    t_in, t_out = solid.ray_interval(points, light)
    return (t_in < t_out) & (t_out > 1e-3)


def _openness(solid: Solid, points: Float32[np.ndarray, "3 n"]) -> Float32[np.ndarray, " n"]:
    """How much ambient light reaches the floor beside the solid: little at its foot, all of it further off."""
    away = np.hypot(points[0] - np.float32(solid.x), points[2] - np.float32(solid.z)) - np.float32(solid.radius)
    return 1 - np.float32(0.55) * np.exp(-np.maximum(away, 0) / np.float32(CONTACT_REACH_M))


def _edges(rgb: Float32[np.ndarray, "3 h w"]) -> Bool[np.ndarray, "h w"]:
    edges = np.zeros(rgb.shape[1:], bool)
    across = np.abs(np.diff(rgb, axis=2)).max(0) > EDGE_CONTRAST
    down = np.abs(np.diff(rgb, axis=1)).max(0) > EDGE_CONTRAST
    edges[:, 1:] |= across
    edges[:, :-1] |= across
    edges[1:] |= down
    edges[:-1] |= down
    return edges
