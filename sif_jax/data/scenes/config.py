"""What a SIF-Scenes data set is made of: frozen knobs, checked when made (host)."""

from __future__ import annotations

from dataclasses import dataclass

from sif_jax.errors import InputError

FAMILIES = (
    "position",
    "existence",
    "counting",
    "size",
    "depth_order",
    "distance",
    "attribute",
    "referring",
    "grounding",
)


@dataclass(frozen=True)
class ScenesConfig:
    """`families` weighs the question families and `sizes_px` lists (width, height). Of each solid at least
    `min_visible_px` pixels and `min_visible_fraction` of its outline are seen. A chain of thought has at most
    `max_areas` areas; `distractor_rate` is how often it first looks at a wrong place (the paper: half of the rows).
    """

    num_solids: tuple[int, int] = (2, 6)
    families: tuple[tuple[str, float], ...] = tuple((family, 1.0) for family in FAMILIES)
    questions_per_scene: int = 1
    sizes_px: tuple[tuple[int, int], ...] = ((336, 224), (224, 336), (392, 224), (280, 224), (224, 280))
    max_areas: int = 4
    distractor_rate: float = 0.5
    min_visible_px: int = 150
    min_visible_fraction: float = 0.6

    def __post_init__(self) -> None:
        low, high = self.num_solids
        _require(2 <= low <= high <= 6, "num_solids", self.num_solids, "2 <= fewest <= most <= 6")
        for family, weight in self.families:
            _require(family in FAMILIES, "families", family, f"one of {', '.join(FAMILIES)}")
            _require(weight > 0, f"families.{family}", weight, "a positive weight; leave the family out instead of 0")
        names = [family for family, _ in self.families]
        _require(len(set(names)) == len(names) > 0, "families", names, "at least one family, each named once")
        _require(
            1 <= self.questions_per_scene <= len(names),
            "questions_per_scene",
            self.questions_per_scene,
            f"1 to {len(names)}, a scene asks each family at most once",
        )
        for size in self.sizes_px:
            _require(all(side % 56 == 0 and side > 0 for side in size), "sizes_px", size, "multiples of 56 pixels")
        _require(len(self.sizes_px) > 0, "sizes_px", self.sizes_px, "at least one (width, height)")
        _require(self.max_areas >= 2, "max_areas", self.max_areas, "at least 2: the whole image and the target")
        _require(0 <= self.distractor_rate <= 1, "distractor_rate", self.distractor_rate, "a rate in [0, 1]")
        _require(self.min_visible_px >= 1, "min_visible_px", self.min_visible_px, "at least 1 pixel")
        _require(
            0 < self.min_visible_fraction <= 1,
            "min_visible_fraction",
            self.min_visible_fraction,
            "a fraction in (0, 1]",
        )


def _require(condition: bool, key: str, value: object, expected: str) -> None:
    if not condition:
        raise InputError(f"scenes.{key} is impossible", value=value, expected=expected)
