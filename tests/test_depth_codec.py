"""The depth code: matplotlib's table, one polarity, exact inverse, and clear refusals."""

import io
import math

import matplotlib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

from sif_jax.errors import InputError
from sif_jax.sif.depth_codec import (
    SPECTRAL_R,
    box_mean_depth,
    decode_depth,
    encode_depth,
    normalise_depth,
    read_depth,
)

depth_maps = hnp.arrays(
    np.float32, hnp.array_shapes(min_dims=2, max_dims=2, max_side=8), elements=st.floats(0, 1, width=32)
)


def smooth_scene(side=96):
    y, x = np.mgrid[:side, :side] / side
    blob = 0.4 * np.exp(-((x - 0.5) ** 2 + (y - 0.6) ** 2) / 0.02)
    return np.clip(0.9 - 0.6 * y - blob, 0, 1).astype(np.float32)


def test_the_table_is_that_of_matplotlib():
    table = (matplotlib.colormaps["Spectral_r"](np.arange(256))[:, :3] * 255).astype(np.uint8)
    np.testing.assert_array_equal(SPECTRAL_R, table)


def test_near_is_zero_and_red():
    colours = encode_depth(np.array([[0.0, 1.0]], np.float32))
    np.testing.assert_array_equal(colours, [[[158, 1, 66], [94, 79, 162]]])
    np.testing.assert_array_equal(decode_depth(colours), [[0, 1]])


def test_grey_and_colour_have_the_same_polarity():
    near_to_far = np.array([[255, 128, 0]], np.uint8)
    np.testing.assert_allclose(decode_depth(near_to_far), [[0, 127 / 255, 1]], atol=1e-7)
    np.testing.assert_allclose(decode_depth(np.stack([near_to_far] * 3, -1)), decode_depth(near_to_far))
    np.testing.assert_allclose(decode_depth(np.array([[65535, 0]], np.uint16)), [[0, 1]])


@settings(deadline=None, max_examples=50)
@given(depth_maps)
def test_decoding_inverts_encoding_within_half_a_level(depth):
    assert np.abs(decode_depth(encode_depth(depth)) - depth).max() <= 0.5 / 255 + 1e-6


def test_inverse_depth_is_scaled_from_near_to_far():
    depth = normalise_depth(np.array([[1.0, 2.0, 4.0, math.inf]], np.float32))
    np.testing.assert_allclose(depth, [[0, 0.5, 0.75, 1]])


def test_a_constant_map_is_half_everywhere():
    np.testing.assert_array_equal(normalise_depth(np.full((2, 3), 7.0, np.float32)), np.full((2, 3), 0.5))


@pytest.mark.parametrize("wrong", [0.0, -1.0, math.nan])
def test_a_depth_that_is_not_positive_is_refused(wrong):
    with pytest.raises(InputError, match="not positive"):
        normalise_depth(np.array([[1.0, wrong]], np.float32))


@pytest.mark.parametrize("wrong", [-0.1, 1.1, math.nan])
def test_only_normalised_depth_can_be_encoded(wrong):
    with pytest.raises(InputError, match="outside"):
        encode_depth(np.array([[0.5, wrong]], np.float32))


def as_jpeg(pixels, quality):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=quality)
    return np.asarray(Image.open(buffer))


def test_jpeg_decodes_approximately():
    scene = smooth_scene()
    assert np.abs(decode_depth(as_jpeg(encode_depth(scene), 85)) - scene).mean() < 0.02


def test_a_photograph_or_swapped_channels_are_no_depth_map():
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    for pixels in (noise, encode_depth(smooth_scene())[..., ::-1]):
        with pytest.raises(InputError, match="not a depth map"):
            decode_depth(pixels)


def test_depth_files_are_read_in_every_usual_mode(tmp_path):
    scene = smooth_scene(24)
    colour = Image.fromarray(encode_depth(scene))
    grey = np.rint((1 - scene) * 255).astype(np.uint8)
    images = {
        "rgb": colour,
        "rgba": colour.convert("RGBA"),
        "palette": colour.quantize(256),
        "grey": Image.fromarray(grey),
        "grey_rgb": Image.fromarray(grey).convert("RGB"),
        "grey16": Image.fromarray(grey.astype(np.uint16) * 257),
    }
    for name, image in images.items():
        image.save(tmp_path / f"{name}.png")
        depth = read_depth(tmp_path / f"{name}.png", expected_size=(24, 24))
        assert np.abs(depth - scene).max() < 0.01, name


def test_missing_truncated_and_wrong_size_files_are_refused(tmp_path):
    path = tmp_path / "d.png"
    with pytest.raises(InputError, match=r"d\.png: cannot read the depth image \(no such file\)"):
        read_depth(path)
    Image.fromarray(encode_depth(smooth_scene())).save(path)
    with pytest.raises(InputError, match=r"wrong size; got \(96, 96\); expected the size of its RGB image, \(96, 95\)"):
        read_depth(path, expected_size=(96, 95))
    whole = path.read_bytes()
    for length in (0, 20, 60, len(whole) // 2):
        path.write_bytes(whole[:length])
        with pytest.raises(InputError, match=r"d\.png: cannot read"):
            read_depth(path)
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)).save(path)
    with pytest.raises(InputError, match=r"d\.png: .*not a depth map"):
        read_depth(path)


RAMP = (np.arange(16, dtype=np.float32) / 16).reshape(4, 4)


@pytest.mark.parametrize(
    ("box", "expected"),
    [
        ((0.0, 0.0, 1.0, 1.0), 7.5 / 16),
        ((0.25, 0.0, 0.5, 0.25), 1 / 16),
        ((0.0, 0.25, 0.5, 0.5), 4.5 / 16),
        ((0.125, 0.125, 0.375, 0.375), 2.5 / 16),
        ((0.26, 0.26, 0.3, 0.3), 5 / 16),
        ((0.999, 0.999, 1.0, 1.0), 15 / 16),
        ((-1.0, -1.0, 2.0, 0.2), 1.5 / 16),
    ],
)
def test_the_mean_depth_is_over_pixels_whose_centre_the_box_holds(box, expected):
    assert box_mean_depth(RAMP, box) == pytest.approx(expected)


@pytest.mark.parametrize("box", [(0.5, 0.0, 0.5, 1.0), (0.8, 0.0, 0.2, 1.0), (1.2, 0.0, 1.5, 1.0), (math.nan,) * 4])
def test_an_empty_inverted_or_outlying_box_has_no_depth(box):
    assert box_mean_depth(RAMP, box) is None


@settings(deadline=None)
@given(depth_maps, st.tuples(*[st.floats(-0.5, 1.5)] * 4))
def test_the_mean_depth_is_never_nan(depth, box):
    mean = box_mean_depth(depth, box)
    assert mean is None or depth.min() - 1e-6 <= mean <= depth.max() + 1e-6
