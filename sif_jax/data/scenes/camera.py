"""A pinhole camera above the floor, looking ahead and down (host)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float


@dataclass(frozen=True)
class Camera:
    """Stands at (0, height_m, 0) and looks along +z, `pitch` radians downwards; the principal point is the centre."""

    width_px: int
    height_px: int
    height_m: float
    pitch: float
    focal_px: float

    @property
    def origin(self) -> Float[np.ndarray, "3 1"]:
        return np.array([[0.0], [self.height_m], [0.0]], np.float32)

    def ray_directions(self, u: Float[np.ndarray, " n"], v: Float[np.ndarray, " n"]) -> Float[np.ndarray, "3 n"]:
        """World directions through the image points (u, v); of length 1 along the optical axis, so t is the depth."""
        right = (u - np.float32(self.width_px / 2)) / np.float32(self.focal_px)
        up = (np.float32(self.height_px / 2) - v) / np.float32(self.focal_px)
        sin, cos = np.float32(math.sin(self.pitch)), np.float32(math.cos(self.pitch))
        return np.array([right, up * cos - sin, up * sin + cos])

    def project(
        self, points: Float[np.ndarray, "3 n"]
    ) -> tuple[Float[np.ndarray, " n"], Float[np.ndarray, " n"], Float[np.ndarray, " n"]]:
        """Image points (u, v) and depth in metres of world points; right only in front of the camera (depth > 0)."""
        x, y, z = points[0], points[1] - self.height_m, points[2]
        sin, cos = math.sin(self.pitch), math.cos(self.pitch)
        depth_m = z * cos - y * sin
        up = z * sin + y * cos
        scale = self.focal_px / depth_m
        return self.width_px / 2 + x * scale, self.height_px / 2 - up * scale, depth_m
