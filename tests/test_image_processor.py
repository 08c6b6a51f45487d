"""Pixels and grids against transformers' Qwen2VLImageProcessorPil: equal to the last bit (tolerance 0)."""

import contextlib
import io
import json
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil, smart_resize

from sif_jax.errors import InputError
from sif_jax.models.qwen2_5_vl import image_processor
from sif_jax.models.qwen2_5_vl.image_processor import ImageProcessor, load_image

SMALL: dict = {"min_pixels": 56 * 56, "max_pixels": 8 * 28 * 28}


def pixels(rng, *shape):
    return rng.integers(0, 256, shape).astype(np.uint8)


def assert_equal_to_transformers(image, **sizes):
    expected = Qwen2VLImageProcessorPil(**sizes)(images=[image], return_tensors="np")
    patched = ImageProcessor(**sizes).patches(image)
    assert patched.patches.dtype == np.float32
    assert [(1, *patched.grid_hw)] == [tuple(grid) for grid in expected["image_grid_thw"]]
    np.testing.assert_array_equal(patched.patches, expected["pixel_values"])


def images_of_every_mode():
    rng = np.random.default_rng(0)
    rgba = Image.fromarray(pixels(rng, 90, 130, 4))
    rgb = rgba.convert("RGB")
    keyed = Image.fromarray(pixels(rng, 60, 80, 3))
    keyed.info["transparency"] = (10, 20, 30)
    palette = rgb.convert("P")
    clear_palette = rgb.convert("P")
    clear_palette.info["transparency"] = 3
    deep = pixels(rng, 70, 90).astype(np.uint16) * 100
    modes = {mode: rgb.convert(mode) for mode in ("1", "L", "LA", "CMYK", "YCbCr", "HSV", "I", "F")}
    modes |= {"RGB": rgb, "RGBA": rgba, "P": palette, "P clear": clear_palette, "RGB keyed": keyed}
    return modes | {"I;16": Image.fromarray(deep), "array": np.array(rgb), "RGBA array": np.array(rgba)}


@pytest.mark.parametrize("name", images_of_every_mode())
def test_every_image_mode_gives_the_pixels_of_transformers(name):
    assert_equal_to_transformers(images_of_every_mode()[name], **SMALL)


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 300), st.integers(1, 300), st.integers(0, 3))
def test_any_size_gives_the_pixels_of_transformers(height, width, seed):
    if max(height, width) > 200 * min(height, width):
        return
    image = Image.fromarray(pixels(np.random.default_rng(seed), height, width, 3))
    assert_equal_to_transformers(image, **SMALL)


@settings(deadline=None, max_examples=300)
@given(st.integers(1, 5000), st.integers(1, 5000), st.sampled_from([(3136, 12845056), (3136, 262144), (784, 1568)]))
def test_resized_sizes_are_those_of_transformers(height, width, bounds):
    limits = {"factor": 28, "min_pixels": bounds[0], "max_pixels": bounds[1]}
    if max(height, width) > 200 * min(height, width):
        with pytest.raises(InputError, match="aspect ratio"):
            image_processor.smart_resize(height, width, **limits)
    else:
        assert image_processor.smart_resize(height, width, **limits) == smart_resize(height, width, **limits)


def test_patches_are_in_merge_block_raster_order_with_both_frames_alike():
    image = np.zeros((56, 56, 3), np.uint8)
    image[0:14, 28:42, 1] = 255  # row 0, column 2 of the patch grid: first patch of the second block
    processor = ImageProcessor(min_pixels=28 * 28, image_mean=(0.0, 0.0, 0.0), image_std=(1.0, 1.0, 1.0))
    patches, grid = processor.patches(image)
    assert grid == (4, 4)
    lit = patches.reshape(16, 3, 2, 196).min(axis=-1)
    assert np.argwhere(lit == 1).tolist() == [[4, 1, 0], [4, 1, 1]]


def test_a_grey_array_is_the_grey_image():
    grey = pixels(np.random.default_rng(1), 60, 60)
    processor = ImageProcessor(**SMALL)
    expected = processor.patches(Image.fromarray(grey)).patches
    np.testing.assert_array_equal(processor.patches(grey).patches, expected)
    np.testing.assert_array_equal(processor.patches(grey[..., None]).patches, expected)


@pytest.mark.parametrize("shape", [(3, 60, 60), (60,), (2, 60, 60, 3)])
def test_an_array_that_is_no_image_is_refused(shape):
    with pytest.raises(InputError, match="channels last"):
        ImageProcessor().patches(np.zeros(shape, np.uint8))


def test_a_float_array_is_refused():
    with pytest.raises(InputError, match="uint8"):
        ImageProcessor().patches(np.zeros((60, 60, 3), np.float32))


@pytest.mark.parametrize(
    "config",
    [
        {"min_pixels": 784, "max_pixels": 3136},
        {"size": {"shortest_edge": 784, "longest_edge": 3136}},
        {"size": {"shortest_edge": 1, "longest_edge": 2}, "min_pixels": 784, "max_pixels": 3136},
        {"size": {"min_pixels": 784, "max_pixels": 3136}, "min_pixels": None},
    ],
)
def test_both_spellings_of_the_size_are_read(tmp_path, config):
    mean = {"image_mean": [0.5, 0.5, 0.5], "image_processor_type": "Qwen2VLImageProcessor"}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(config | mean))
    assert ImageProcessor.from_directory(tmp_path) == ImageProcessor(784, 3136, image_mean=(0.5, 0.5, 0.5))


def test_the_nested_config_of_transformers_5_is_read(tmp_path):
    nested = {"image_processor": {"size": {"shortest_edge": 784, "longest_edge": 3136}}}
    (tmp_path / "processor_config.json").write_text(json.dumps(nested))
    assert ImageProcessor.from_directory(tmp_path).max_pixels == 3136


def test_a_saved_processor_is_the_same_here_and_in_transformers(tmp_path):
    processor = ImageProcessor(min_pixels=784, max_pixels=3136, image_std=(0.5, 0.25, 0.125))
    processor.save(tmp_path)
    assert ImageProcessor.from_directory(tmp_path) == processor
    image = Image.fromarray(pixels(np.random.default_rng(2), 100, 50, 3))
    expected = Qwen2VLImageProcessorPil.from_pretrained(tmp_path)(images=[image], return_tensors="np")
    np.testing.assert_array_equal(processor.patches(image).patches, expected["pixel_values"])


def test_an_override_wins_over_the_file(tmp_path):
    ImageProcessor().save(tmp_path)
    assert ImageProcessor.from_directory(tmp_path, max_pixels=262144).max_pixels == 262144


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"do_normalize": false}', "do_normalize"),
        ('{"min_pixels": 10, "max_pixels": 5}', "min_pixels <= max_pixels"),
        ("{", "malformed JSON at line 1"),
    ],
)
def test_a_bad_config_is_refused(tmp_path, text, message):
    (tmp_path / "preprocessor_config.json").write_text(text)
    with pytest.raises(InputError, match=message):
        ImageProcessor.from_directory(tmp_path)


def test_a_rotated_photograph_is_loaded_upright(tmp_path):
    image = Image.fromarray(pixels(np.random.default_rng(3), 20, 40, 3))
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees to show
    image.save(tmp_path / "a.png", exif=exif)
    assert load_image(tmp_path / "a.png").size == (20, 40)
    np.testing.assert_array_equal(np.asarray(load_image(tmp_path / "a.png")), np.rot90(np.asarray(image), -1))


def test_a_missing_image_is_refused_with_its_path(tmp_path):
    with pytest.raises(InputError, match=r"none\.png: no such image"):
        load_image(tmp_path / "none.png")


def test_a_file_that_is_no_image_is_refused(tmp_path):
    (tmp_path / "a.jpg").write_text("not an image")
    with pytest.raises(InputError, match="cannot be read"):
        load_image(tmp_path / "a.jpg")


def test_an_image_bomb_is_refused(tmp_path, monkeypatch):
    Image.new("L", (100, 100)).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 4000)
    with pytest.raises(InputError, match="too large"):
        load_image(tmp_path / "a.png")


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow warns of damaged metadata
@settings(deadline=None, max_examples=150)
@given(kind=st.sampled_from(["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP"]), data=st.data())
def test_a_damaged_file_loads_or_is_refused_but_never_crashes(tmp_path_factory, kind, data):
    buffer = io.BytesIO()
    Image.fromarray(pixels(np.random.default_rng(4), 16, 16, 3)).save(buffer, kind)
    raw = bytearray(buffer.getvalue()[: data.draw(st.integers(0, len(buffer.getvalue())))])
    for position in data.draw(st.lists(st.integers(0, max(len(raw) - 1, 0)), max_size=3)) if raw else []:
        raw[position] ^= data.draw(st.integers(1, 255))
    path = tmp_path_factory.mktemp("damaged") / "image"
    path.write_bytes(raw)
    with contextlib.suppress(InputError):
        assert load_image(path).mode == "RGB"


@pytest.mark.slow
def test_an_image_of_the_demo_size_takes_about_a_millisecond():
    image = pixels(np.random.default_rng(5), 224, 336, 3)
    processor = ImageProcessor()
    started = time.perf_counter()
    for _ in range(50):
        processor.patches(image)
    assert (time.perf_counter() - started) / 50 < 0.004
