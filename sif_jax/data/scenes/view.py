"""What a scene lets one say with certainty: relations between solids, by margins that leave no doubt (host)."""

from __future__ import annotations

from dataclasses import dataclass

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

    def is_left_of(self, first: int, second: int) -> bool:
        centres = self.boxes_norm[:, [0, 2]].mean(1)
        in_image = centres[second] - centres[first] > BESIDE_IMAGE
        return bool(in_image and self.solids[second].x - self.solids[first].x > BESIDE_M)

    def is_closer(self, first: int, second: int) -> bool:
        """By distance, by depth along the optical axis and by the depth map under the two boxes."""
        camera = self.scene.camera
        points = np.stack([self.solids[first].centre, self.solids[second].centre], axis=1)
        distance = np.linalg.norm(points - camera.origin, axis=0)
        _, _, depth_m = camera.project(points)
        in_metres = min(distance[1] - distance[0], depth_m[1] - depth_m[0]) > CLOSER_M
        return bool(in_metres and self.depths_norm[first] < self.depths_norm[second])

    def is_larger(self, first: int, second: int) -> bool:
        return (self.solids[first].size, self.solids[second].size) == ("large", "small")

    def is_nearer_to(self, anchor: int, first: int, second: int) -> bool:
        if anchor in (first, second):
            return False
        near, far = (np.linalg.norm(self.solids[i].centre - self.solids[anchor].centre) for i in (first, second))
        return bool(far - near > NEARER_M and far > NEARER_RATIO * near)

    def groups(self, *, most: int) -> dict[str, tuple[int, ...]]:
        """The solids of each kind and of each colour that has at most `most`, from left to right."""
        groups: dict[str, list[int]] = {}
        for index in np.argsort(self.boxes_norm[:, 0], kind="stable").tolist():
            solid = self.solids[index]
            groups.setdefault(PLURALS[solid.kind], []).append(index)
            groups.setdefault(f"{solid.colour} objects", []).append(index)
        return {group: tuple(gold) for group, gold in groups.items() if len(gold) <= most}
