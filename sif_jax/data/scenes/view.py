"""What a scene lets one say with certainty: relations between solids, by margins that leave no doubt (host)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Float64

from sif_jax.data.scenes.layout import Boxes
from sif_jax.data.scenes.render import Scene
from sif_jax.data.scenes.solids import PLURALS, Solid

BESIDE_IMAGE, BESIDE_M = 0.08, 0.15
CLOSER_M = 0.5
NEARER_M, NEARER_RATIO = 0.5, 1.3


@dataclass(frozen=True)
class View:
    """A scene with the boxes of its solids' visible parts, in thousandths, and the mean depth there (0 near, 1 far)."""

    scene: Scene
    boxes_norm: Boxes
    depths_norm: Float64[np.ndarray, " solids"]

    @property
    def solids(self) -> tuple[Solid, ...]:
        return self.scene.solids

    @cached_property
    def _reaches_m(self) -> Float64[np.ndarray, "2 solids"]:
        """Distance from the camera and depth along its optical axis."""
        camera = self.scene.camera
        centres = np.stack([solid.centre for solid in self.solids], axis=1)
        return np.stack([np.linalg.norm(centres - camera.origin, axis=0), camera.project(centres)[2]])

    def is_left_of(self, first: int, second: int) -> bool:
        in_image = (self.boxes_norm[second] - self.boxes_norm[first])[[0, 2]].mean() > BESIDE_IMAGE
        return bool(in_image and self.solids[second].x - self.solids[first].x > BESIDE_M)

    def is_closer(self, first: int, second: int) -> bool:
        """By distance, by depth along the optical axis and by the depth map under the two boxes."""
        in_metres = (self._reaches_m[:, second] - self._reaches_m[:, first]).min() > CLOSER_M
        return bool(in_metres and self.depths_norm[first] < self.depths_norm[second])

    def is_larger(self, first: int, second: int) -> bool:
        return (self.solids[first].size, self.solids[second].size) == ("large", "small")

    def is_nearer_to(self, anchor: int, first: int, second: int) -> bool:
        if anchor in (first, second):
            return False
        near, far = (math.dist(self.solids[i].centre, self.solids[anchor].centre) for i in (first, second))
        return far - near > NEARER_M and far > NEARER_RATIO * near

    def groups(self, *, most: int) -> dict[str, tuple[int, ...]]:
        """The solids of each kind and of each colour that has at most `most`, from left to right."""
        groups: dict[str, list[int]] = {}
        for index in np.argsort(self.boxes_norm[:, 0], kind="stable").tolist():
            solid = self.solids[index]
            groups.setdefault(PLURALS[solid.kind], []).append(index)
            groups.setdefault(f"{solid.colour} objects", []).append(index)
        return {group: tuple(gold) for group, gold in groups.items() if len(gold) <= most}
