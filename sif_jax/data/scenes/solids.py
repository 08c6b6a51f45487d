"""Solids standing on the floor, met by rays analytically: sphere, box, cylinder, cone (host).

World frame in metres: x to the right, y up (the floor is y = 0), z away from the camera. Every solid is convex, so a
ray is inside it on one interval [t_in, t_out]; its local frame has the origin at the centre of its footprint. All but
the box are round about that axis, so only the box's own faces turn with the yaw.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property, reduce
from typing import Literal, get_args

import numpy as np
from jaxtyping import Float

Kind = Literal["sphere", "box", "cylinder", "cone"]
Size = Literal["small", "large"]
KINDS: tuple[Kind, ...] = get_args(Kind)
PLURALS: dict[Kind, str] = {"sphere": "spheres", "box": "boxes", "cylinder": "cylinders", "cone": "cones"}

COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (0.86, 0.13, 0.14),
    "orange": (0.98, 0.52, 0.06),
    "yellow": (0.98, 0.86, 0.16),
    "green": (0.16, 0.62, 0.22),
    "cyan": (0.22, 0.80, 0.84),
    "blue": (0.15, 0.29, 0.86),
    "purple": (0.56, 0.20, 0.72),
    "black": (0.13, 0.13, 0.15),
}

UNIT_CORNERS = np.array(np.meshgrid([-1, 1], [0, 1], [-1, 1], indexing="ij"), dtype=float).reshape(3, 8)

Vectors = Float[np.ndarray, "3 #n"]
Interval = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True)
class Solid:
    """`radius` is that of the sphere, the cylinder and the cone's base, and half the side of the box."""

    kind: Kind
    colour: str
    size: Size
    x: float
    z: float
    radius: float
    height: float
    yaw: float

    @property
    def name(self) -> str:
        return f"{self.colour} {self.kind}"

    @property
    def footprint_radius(self) -> float:
        return self.radius * (2**0.5 if self.kind == "box" else 1.0)

    @property
    def centre(self) -> Float[np.ndarray, " 3"]:
        return np.array([self.x, self.height / 2, self.z])

    @cached_property
    def bounding_corners(self) -> Float[np.ndarray, "3 8"]:
        """Corners of the box that bounds the solid, yawed with it."""
        corners = _rotate(UNIT_CORNERS * np.array([[self.radius], [self.height], [self.radius]]), self.yaw)
        return corners + np.array([[self.x], [0.0], [self.z]])

    def _to_local(self, points: Vectors) -> Vectors:
        return points - np.array([[self.x], [0.0], [self.z]], np.float32)

    def ray_interval(self, origin: Vectors, direction: Vectors) -> Interval:
        """Where the rays `origin + t * direction` are inside the solid; empty (t_in > t_out) where they miss it."""
        with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
            return _INTERVALS[self.kind](self, self._to_local(origin), direction)

    def normals(self, points: Float[np.ndarray, "3 n"]) -> Float[np.ndarray, "3 n"]:
        """Outward unit normals at points on the surface."""
        return _NORMALS[self.kind](self, self._to_local(points))


def _rotate(vectors: Vectors, yaw: float) -> Vectors:
    x, y, z = vectors
    cos, sin = np.float32(math.cos(yaw)), np.float32(math.sin(yaw))
    return np.array([cos * x + sin * z, y, cos * z - sin * x])


def _quadratic_interval(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> Interval:
    """Where a t² + 2 b t + c <= 0, for a >= 0; empty (inf, -inf) where the roots are not real.

    For a < 0 it is the interval between the roots, where the polynomial is positive. The roots are q / a and c / q, which
    keeps the digits when a is small.
    """
    discriminant = b * b - a * c
    q = -(b + np.copysign(np.sqrt(np.maximum(discriminant, 0)), b))
    first, second = q / a, c / q
    hit = discriminant >= 0
    return np.where(hit, np.fmin(first, second), np.inf), np.where(hit, np.fmax(first, second), -np.inf)


def _slab_interval(o: np.ndarray, d: np.ndarray, low: float, high: float) -> Interval:
    """Where low <= o + t d <= high. Rays within the slab's plane divide by zero and give the right infinities."""
    t_low, t_high = (np.float32(low) - o) / d, (np.float32(high) - o) / d
    return np.minimum(t_low, t_high), np.maximum(t_low, t_high)


def _intersection(*intervals: Interval) -> Interval:
    starts, ends = zip(*intervals)
    return reduce(np.maximum, starts), reduce(np.minimum, ends)


def _sphere_interval(solid: Solid, o: np.ndarray, d: np.ndarray) -> Interval:
    (ox, oy, oz), (dx, dy, dz) = o, d
    oy = oy - np.float32(solid.radius)
    return _quadratic_interval(
        dx * dx + dy * dy + dz * dz,
        ox * dx + oy * dy + oz * dz,
        ox * ox + oy * oy + oz * oz - np.float32(solid.radius**2),
    )


def _box_interval(solid: Solid, o: np.ndarray, d: np.ndarray) -> Interval:
    r = solid.radius
    o, d = _rotate(o, -solid.yaw), _rotate(d, -solid.yaw)
    return _intersection(
        _slab_interval(o[0], d[0], -r, r),
        _slab_interval(o[1], d[1], 0.0, solid.height),
        _slab_interval(o[2], d[2], -r, r),
    )


def _cylinder_interval(solid: Solid, o: np.ndarray, d: np.ndarray) -> Interval:
    (ox, oy, oz), (dx, dy, dz) = o, d
    side = _quadratic_interval(dx * dx + dz * dz, ox * dx + oz * dz, ox * ox + oz * oz - np.float32(solid.radius**2))
    return _intersection(side, _slab_interval(oy, dy, 0.0, solid.height))


def _cone_interval(solid: Solid, o: np.ndarray, d: np.ndarray) -> Interval:
    """x² + z² <= k² (height - y)². A ray steeper than the side (a < 0) meets both nappes; the lower one is ours."""
    (ox, oy, oz), (dx, dy, dz) = o, d
    k2 = np.float32((solid.radius / solid.height) ** 2)
    oy_apex = oy - np.float32(solid.height)
    a = dx * dx + dz * dz - k2 * dy * dy
    b = ox * dx + oz * dz - k2 * oy_apex * dy
    c = ox * ox + oz * oz - k2 * oy_apex * oy_apex
    t_in, t_out = _quadratic_interval(a, b, c)
    steep, down = a < 0, dy < 0
    nappe = (
        np.where(steep, np.where(down, t_out, -np.inf), t_in),
        np.where(steep, np.where(down, np.inf, t_in), t_out),
    )
    return _intersection(nappe, _slab_interval(oy, dy, 0.0, solid.height))


def _sphere_normals(solid: Solid, p: np.ndarray) -> np.ndarray:
    return (p - np.array([[0.0], [solid.radius], [0.0]], np.float32)) / np.float32(solid.radius)


def _box_normals(solid: Solid, p: np.ndarray) -> np.ndarray:
    half = np.array([[solid.radius], [solid.height / 2], [solid.radius]], np.float32)
    unit = _rotate(p, -solid.yaw) / half - np.array([[0.0], [1.0], [0.0]], np.float32)
    face = np.abs(unit).argmax(0) == np.arange(3)[:, None]
    return _rotate(np.sign(unit) * face, solid.yaw)


def _cylinder_normals(solid: Solid, p: np.ndarray) -> np.ndarray:
    top = p[1] > solid.height * 0.999
    radial = p / np.float32(solid.radius)
    return np.stack([np.where(top, 0, radial[0]), top.astype(p.dtype), np.where(top, 0, radial[2])])


def _cone_normals(solid: Solid, p: np.ndarray) -> np.ndarray:
    slope = np.float32(solid.radius / solid.height)
    radial = np.maximum(np.hypot(p[0], p[2]), np.float32(1e-6))
    return np.stack([p[0] / radial, np.full_like(radial, slope), p[2] / radial]) / np.hypot(1, slope)


_INTERVALS = {
    "sphere": _sphere_interval,
    "box": _box_interval,
    "cylinder": _cylinder_interval,
    "cone": _cone_interval,
}
_NORMALS = {"sphere": _sphere_normals, "box": _box_normals, "cylinder": _cylinder_normals, "cone": _cone_normals}
