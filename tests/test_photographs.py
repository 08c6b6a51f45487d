"""SIF rows over the photographs in the scikit-image wheel."""

from __future__ import annotations

import socket
import sys

import numpy as np
import pytest
from PIL import Image

from sif_jax.data.photographs.build import build_photographs, stereo_depth
from sif_jax.errors import InputError
from sif_jax.sif.depth_codec import box_mean_depth, read_depth
from sif_jax.sif.record import read_records

pytest.importorskip("skimage")


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    def refuse(*_args, **_kwargs):
        raise AssertionError("the photographs must need no network")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket, "socket", refuse)
        path = build_photographs(tmp_path_factory.mktemp("photographs"))
    return path.parent, read_records(path).records


def crop(built, words: str) -> np.ndarray:
    """The mean colour inside the first gold box of the question with these words."""
    folder, records = built
    (record,) = [record for record in records if words in record.problem]
    with Image.open(folder / record.image) as image:
        x1, y1, x2, y2 = record.gold_boxes[0]
        box = (x1 * image.width, y1 * image.height, x2 * image.width, y2 * image.height)
        return np.asarray(image.crop(tuple(round(v) for v in box)), np.float64).reshape(-1, 3).mean(0)


def test_there_are_rows_over_several_photographs_with_boxes_and_answers(built):
    folder, records = built
    assert len(records) >= 10
    assert len({record.image for record in records}) >= 3
    for record in records:
        assert record.gold_boxes
        assert record.response
        assert record.completion is None
        assert (folder / record.image).is_file()


def test_the_boxes_lie_on_what_the_questions_name(built):
    r, g, b = crop(built, "car wash bottle")
    assert min(r, g) > 1.5 * b  # yellow
    r, g, b = crop(built, "colour is the suit")
    assert r > 1.4 * g > 1.4 * b  # orange, with the dark collar in it
    assert crop(built, "colour is the rocket").min() > 100
    r, g, b = crop(built, "colour are the eyes")
    assert g > 1.2 * b


def test_only_the_motorcycle_has_a_depth_map_and_it_orders_what_is_seen(built):
    folder, records = built
    assert {record.depth_image for record in records} == {None, "depth/motorcycle.png"}
    by_words = {record.problem: record for record in records if record.depth_image}
    depth_norm = read_depth(folder / "depth/motorcycle.png", (741, 500))

    def depth(words: str, index: int = 0) -> float:
        (record,) = [record for problem, record in by_words.items() if words in problem]
        mean = box_mean_depth(depth_norm, record.gold_boxes[index])
        assert mean is not None
        return mean

    assert depth("headlight") < depth("headlight", 1) < depth("car wash bottle")
    assert depth("closer to the camera") < depth("closer to the camera", 1)


def test_disparity_gives_metres_and_gaps_take_the_farther_neighbour():
    disparity_px = np.array([[np.nan, 10.0, np.inf, 40.0, np.nan]], np.float32)
    near, far = 994.978 * 0.193001 / (40 + 31.086), 994.978 * 0.193001 / (10 + 31.086)
    np.testing.assert_allclose(stereo_depth(disparity_px), [[far, far, far, near, near]], rtol=1e-5)


def test_without_scikit_image_one_line_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "skimage.data", None)
    with pytest.raises(InputError, match=r"scikit-image.*pip install"):
        build_photographs(tmp_path)
