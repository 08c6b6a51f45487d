"""Geometry and frames of boxes, against shapely and hand-computed cases."""

import numpy as np
import pytest
import shapely
from hypothesis import given, settings
from hypothesis import strategies as st

from sif_jax.sif.boxes import (
    WHOLE_IMAGE,
    as_boxes,
    box_area,
    from_padded_square,
    from_pixels,
    pairwise_iou,
    to_padded_square,
    to_pixels,
    union_area,
)

unit = st.integers(0, 40).map(lambda n: n / 40)
a_box = st.tuples(unit, unit, unit, unit).map(
    lambda v: (min(v[0], v[2]), min(v[1], v[3]), max(v[0], v[2]), max(v[1], v[3]))
)
some_boxes = st.lists(a_box, max_size=6)
sizes = st.tuples(st.integers(1, 2000), st.integers(1, 2000))


def test_areas_and_overlaps_of_two_quarter_shifted_squares():
    a, b = as_boxes([[0, 0, 2, 2]]), as_boxes([[1, 1, 3, 3], [5, 5, 6, 6]])
    np.testing.assert_array_equal(box_area(b), [4, 1])
    np.testing.assert_allclose(pairwise_iou(a, b), [[1 / 7, 0]])
    assert union_area(np.concatenate([a, b])) == 8


@settings(deadline=None, max_examples=200)
@given(some_boxes)
def test_the_union_is_that_of_shapely(boxes):
    expected = shapely.union_all([shapely.box(*box) for box in boxes]).area
    assert union_area(as_boxes(boxes)) == pytest.approx(expected, abs=1e-9)


@settings(deadline=None)
@given(some_boxes, some_boxes)
def test_iou_is_symmetric_within_bounds_and_never_nan(a, b):
    a, b = as_boxes(a), as_boxes(b)
    iou = pairwise_iou(a, b)
    np.testing.assert_array_equal(iou, pairwise_iou(b, a).T)
    assert ((iou >= 0) & (iou <= 1)).all()


def test_xywh_boxes_are_refused_by_area():
    with pytest.raises(ValueError, match="inverted box"):
        box_area(as_boxes([[0.5, 0.5, 0.2, 0.2]]))


@pytest.mark.parametrize("wrong", [np.array([0.0, 0.0, 1.0, 1.0]), [[0.0, 1.0]], [[0.0, 0.0, 1.0, float("nan")]]])
def test_what_is_not_a_list_of_boxes_is_refused(wrong):
    with pytest.raises(ValueError, match="expected boxes"):
        as_boxes(wrong)


def test_a_wide_image_is_padded_above_and_below():
    whole = as_boxes([WHOLE_IMAGE])
    np.testing.assert_allclose(to_padded_square(whole, (640, 480)), [[0, 0.125, 1, 0.875]])
    np.testing.assert_allclose(from_padded_square(as_boxes([[0.5, 0.5, 1, 1]]), (640, 480)), [[0.5, 0.5, 1, 1]])


def test_a_viscot_box_lies_where_its_pixels_say():
    # VisCoT vsr, a 640 x 480 photograph: the conversation box and the pixel box of one row.
    square = as_boxes([[0.614, 0.619, 0.731, 0.773]])
    pixels = to_pixels(from_padded_square(square, (640, 480)), (640, 480))
    np.testing.assert_allclose(pixels, [[392, 316, 467, 414]], atol=1.5)


@settings(deadline=None)
@given(some_boxes, sizes)
def test_frames_convert_both_ways(boxes, size):
    boxes = as_boxes(boxes)
    np.testing.assert_allclose(from_pixels(to_pixels(boxes, size), size), boxes, atol=1e-9)
    np.testing.assert_allclose(from_padded_square(to_padded_square(boxes, size), size), boxes, atol=1e-9)
