"""SIF-Scenes: solids, camera, ray casting and layouts."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sif_jax.data.scenes.camera import Camera
from sif_jax.data.scenes.config import ScenesConfig
from sif_jax.data.scenes.layout import HEIGHT, RADIUS_M, WIDTH, sample_scene, visible_boxes
from sif_jax.data.scenes.render import Scene, Surroundings, paint, trace_pixels
from sif_jax.data.scenes.solids import KINDS, Solid

CAMERA = Camera(width_px=112, height_px=56, height_m=2.0, pitch=0.4, focal_px=100.0)
GREY = (0.6, 0.6, 0.6)


def solid(kind="sphere", *, x=0.0, z=5.0, radius=1.0, height=2.0, yaw=0.0, colour="red", size="large") -> Solid:
    return Solid(kind, colour, size, x, z, radius, height, yaw)


def scene(*solids: Solid, camera: Camera = CAMERA, light=(0.6, 0.8, 0.0)) -> Scene:
    return Scene(camera, Surroundings((GREY, GREY), 0.0, GREY, 10.0, light), solids)


def column(*values: float) -> np.ndarray:
    return np.array(values, np.float32)[:, None]


@pytest.mark.parametrize(
    ("target", "eye", "expected"),
    [
        (solid("sphere"), 1.0, (4.0, 6.0)),
        (solid("box"), 1.0, (4.0, 6.0)),
        (solid("box", yaw=np.pi / 4), 1.0, (5 - 2**0.5, 5 + 2**0.5)),
        (solid("cylinder"), 0.5, (4.0, 6.0)),
        (solid("cone"), 1.0, (4.5, 5.5)),
    ],
)
def test_a_level_ray_crosses_a_solid_where_the_hand_computes(target, eye, expected):
    t_in, t_out = target.ray_interval(column(0, eye, 0), column(0, 0, 1))
    assert (t_in.item(), t_out.item()) == pytest.approx(expected, abs=1e-4)


def is_inside(target: Solid, point: np.ndarray) -> np.ndarray:
    """Membership from the definition of each solid, in float64."""
    x, y, z = point[0] - target.x, point[1], point[2] - target.z
    along = np.cos(target.yaw) * x - np.sin(target.yaw) * z
    across = np.sin(target.yaw) * x + np.cos(target.yaw) * z
    between = (y >= 0) & (y <= target.height)
    r = target.radius
    return {
        "sphere": x**2 + (y - r) ** 2 + z**2 <= r**2,
        "box": between & (np.abs(along) <= r) & (np.abs(across) <= r),
        "cylinder": between & (x**2 + z**2 <= r**2),
        "cone": between & (np.hypot(x, z) <= r * (1 - y / target.height)),
    }[target.kind]


UNIT = st.floats(-1, 1, width=32)


@settings(deadline=None, max_examples=150)
@given(st.sampled_from(KINDS), UNIT, UNIT, UNIT, UNIT, UNIT, UNIT)
def test_a_ray_is_inside_a_solid_exactly_on_its_interval(kind, x, y, z, dx, dy, yaw):
    target = solid(kind, x=0.3, z=4.0, radius=0.8, height=1.6, yaw=yaw)
    origin, direction = column(2 * x, 1 + y, z), column(dx, dy, 1 + z / 2)
    t_in, t_out = (edge.item() for edge in target.ray_interval(origin, direction))
    t = np.linspace(-2, 12, 2000)
    inside = is_inside(target, origin.astype(float) + direction.astype(float) * t)
    margin = 2e-2
    assert inside[(t > t_in + margin) & (t < t_out - margin)].all()
    assert not inside[(t < t_in - margin) | (t > t_out + margin)].any()


@pytest.mark.parametrize("kind", KINDS)
def test_normals_are_unit_vectors_that_point_outwards(kind):
    target = solid(kind, x=0.2, yaw=0.5)
    rng = np.random.default_rng(0)
    directions = rng.normal(size=(3, 200)).astype(np.float32)
    inner = np.array([[0.2], [0.9], [5.0]], np.float32)
    _, t_out = target.ray_interval(inner, directions)
    surface = (inner + t_out * directions)[:, (inner + t_out * directions)[1] > 0.01]
    normals = target.normals(surface)
    np.testing.assert_allclose(np.linalg.norm(normals, axis=0), 1, atol=1e-3)
    assert not is_inside(target, surface + 0.01 * normals).any()
    assert is_inside(target, surface - 0.01 * normals).mean() > 0.97  # all but the rims, where two faces meet


@settings(deadline=None, max_examples=100)
@given(st.floats(0.0, 112.0, width=32), st.floats(0.0, 56.0, width=32), st.floats(0.5, 20.0, width=32))
def test_projection_undoes_the_ray_and_t_is_the_depth(u, v, t):
    direction = CAMERA.ray_directions(np.array([u], np.float32), np.array([v], np.float32))
    back_u, back_v, depth_m = CAMERA.project(CAMERA.origin + np.float32(t) * direction)
    np.testing.assert_allclose([back_u[0], back_v[0], depth_m[0]], [u, v, t], atol=2e-3)


def test_the_floor_has_the_depth_of_its_plane_and_the_wall_bounds_it():
    level = Camera(width_px=56, height_px=56, height_m=2.0, pitch=0.0, focal_px=28.0)
    depth_m = trace_pixels(scene(camera=level)).depth_m
    # Row 40 looks down by (40.5 - 28) / 28 for each metre ahead.
    np.testing.assert_allclose(depth_m[40], 2.0 * 28 / 12.5, rtol=1e-5)
    np.testing.assert_allclose(depth_m[:28], 10.0, rtol=1e-5)
    assert depth_m.dtype == np.float32


def test_the_nearer_solid_hides_the_farther_one():
    geometry = trace_pixels(scene(solid("box", z=7.0), solid("sphere", z=5.0, radius=0.4, height=0.8)))
    alone = trace_pixels(scene(solid("box", z=7.0)))
    hidden = (geometry.instances == 2) & (alone.instances == 1)
    assert hidden.any()
    assert (geometry.depth_m[hidden] < alone.depth_m[hidden]).all()
    np.testing.assert_array_equal(geometry.outline_px[0], (alone.instances == 1).sum())


def test_the_side_away_from_the_light_lies_in_shadow():
    target = scene(solid("cylinder", radius=0.4, height=1.0))
    rgb = paint(target, trace_pixels(target)).astype(int).sum(-1)
    empty = paint(scene(), trace_pixels(scene())).astype(int).sum(-1)
    u, v, _ = CAMERA.project(np.array([[0.7, -0.7], [0.0, 0.0], [5.0, 5.0]]))
    lit, shadowed = ((int(row), int(column)) for row, column in zip(v, u))
    assert rgb[lit] > 0.9 * empty[lit]
    assert rgb[shadowed] < 0.7 * empty[shadowed]


def test_edges_are_smooth_and_the_rest_is_left_alone():
    target = scene(solid("sphere", radius=0.6, height=1.2))
    geometry = trace_pixels(target)
    rgb = paint(target, geometry)
    rim = (geometry.instances == 1) & (np.roll(geometry.instances, 1, axis=1) == 0)
    red = rgb[..., 0].astype(int) - rgb[..., 1]
    inside = red[geometry.instances == 1].max()
    assert ((red[rim] > 0.1 * inside) & (red[rim] < 0.9 * inside)).any()
    assert rgb.shape == (56, 112, 3)


def test_every_large_solid_is_larger_than_every_small_one_in_volume_width_and_height():
    def extents(kind, size, end):
        radius = RADIUS_M[size][end] * WIDTH[kind]
        height = radius * HEIGHT[kind][end]
        share = {"sphere": 4 / 3 * np.pi / 2, "box": 4.0, "cylinder": np.pi, "cone": np.pi / 3}[kind]
        return np.array([share * radius**2 * height, 2 * radius, height])

    for large, small in itertools.product(KINDS, KINDS):
        assert (extents(large, "large", 0) > extents(small, "small", 1)).all(), (large, small)


def sampled(seed: int, config: ScenesConfig | None = None):
    return sample_scene(np.random.default_rng(seed), config or ScenesConfig())


@pytest.mark.parametrize("seed", range(12))
def test_solids_are_apart_whole_visible_and_named_once(seed):
    config = ScenesConfig(num_solids=(4, 6))
    drawn, geometry = sampled(seed, config)
    assert 4 <= len(drawn.solids) <= 6
    for first, second in itertools.combinations(drawn.solids, 2):
        gap = np.hypot(first.x - second.x, first.z - second.z)
        assert gap > first.footprint_radius + second.footprint_radius
    assert len({item.name for item in drawn.solids}) == len(drawn.solids)
    assert {item.size for item in drawn.solids} == {"small", "large"}
    for index in range(len(drawn.solids)):
        visible = (geometry.instances == index + 1).sum()
        assert visible >= config.min_visible_px
        assert visible >= config.min_visible_fraction * geometry.outline_px[index]
    border = np.concatenate([geometry.instances[[0, -1]].ravel(), geometry.instances[:, [0, -1]].ravel()])
    assert not border.any()


@pytest.mark.parametrize("seed", range(4))
def test_the_outlines_are_those_of_rays_through_every_pixel(seed):
    drawn, geometry = sampled(seed)
    camera = drawn.camera
    v, u = (axis.ravel() + np.float32(0.5) for axis in np.indices(geometry.instances.shape, np.float32))
    directions = camera.ray_directions(u, v)
    hits = [np.less(*target.ray_interval(camera.origin, directions)).sum() for target in drawn.solids]
    np.testing.assert_array_equal(geometry.outline_px, hits)
    _, _, depth_m = camera.project(geometry.points.reshape(3, -1))
    np.testing.assert_allclose(depth_m, geometry.depth_m.ravel(), rtol=1e-4)


@pytest.mark.parametrize("seed", range(4))
def test_a_box_bounds_exactly_the_visible_pixels(seed):
    drawn, geometry = sampled(seed)
    h, w = geometry.instances.shape
    for index, (x1, y1, x2, y2) in enumerate(visible_boxes(geometry, len(drawn.solids))):
        mask = geometry.instances == index + 1
        left, top, right, bottom = round(x1 * w), round(y1 * h), round(x2 * w), round(y2 * h)
        assert mask[top:bottom, left:right].sum() == mask.sum()
        for edge in (mask[top, :], mask[bottom - 1, :], mask[:, left], mask[:, right - 1]):
            assert edge.any()


def test_the_same_generator_gives_the_same_picture_and_another_gives_another():
    pictures = [paint(*sampled(seed)).tobytes() for seed in (3, 3, 4)]
    assert pictures[0] == pictures[1] != pictures[2]
