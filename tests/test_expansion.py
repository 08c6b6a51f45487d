"""Reverse expansion: what every chain contains, and in which order."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sif_jax.sif.boxes import WHOLE_IMAGE, as_boxes, pairwise_iou
from sif_jax.sif.expansion import expand_once, reverse_expansion
from sif_jax.sif.grammar import BoxDepth, Step, parse, render

WHOLE = (WHOLE_IMAGE,)
interval = st.lists(st.integers(0, 1000), min_size=2, max_size=2, unique=True).map(
    lambda v: [n / 1000 for n in sorted(v)]
)
gold_sets = st.lists(
    st.tuples(interval, interval).map(lambda v: (v[0][0], v[1][0], v[0][1], v[1][1])), min_size=1, max_size=5
)
sizes = st.tuples(st.integers(16, 2000), st.integers(16, 2000))
seeds = st.integers(0, 2**32)


def chain(gold, size=(100, 100), seed=0, share=0.5):
    return reverse_expansion(gold, size, np.random.default_rng(seed), distractor_share=share)


def without_distractor(gold, size=(100, 100)):
    return next(c for seed in range(50) if not has_distractor(c := chain(gold, size, seed), gold))


def has_distractor(areas, gold):
    return len(areas) > 1 and not contains(areas[1], gold)


def contains(area, gold):
    return all(any(a[0] <= g[0] and a[1] <= g[1] and g[2] <= a[2] and g[3] <= a[3] for a in area) for g in gold)


def test_a_single_box_grows_by_a_fifth_of_its_distance_to_the_farthest_border():
    gold = [(0.2, 0.4, 0.3, 0.5)]
    # The farthest border is the right one, 70 px away; 70 / 5 = 14 px.
    assert without_distractor(gold) == [WHOLE, ((0.06, 0.26, 0.44, 0.64),), tuple(gold)]


def test_steps_are_equal_in_pixels_not_in_shares():
    assert expand_once(((0.4, 0.4, 0.6, 0.6),), (200, 100), 4) == ((0.3, 0.2, 0.7, 0.8),)


def test_boxes_that_meet_are_merged_and_distant_ones_get_a_merged_box():
    meeting = [(0.4, 0.4, 0.45, 0.6), (0.5, 0.4, 0.55, 0.6)]
    assert [len(area) for area in without_distractor(meeting)] == [1, 1, 2]
    distant = [(0.0, 0.0, 0.1, 0.1), (0.8, 0.0, 0.9, 0.1)]
    assert without_distractor(distant) == [
        WHOLE,
        ((0.0, 0.0, 1.0, 0.28),),
        ((0.0, 0.0, 0.28, 0.28), (0.62, 0.0, 1.0, 0.28)),
        tuple(distant),
    ]


def test_a_gold_box_of_the_whole_image_is_the_whole_chain():
    assert chain([WHOLE_IMAGE]) == [WHOLE]


def test_a_row_without_gold_boxes_is_refused():
    with pytest.raises(ValueError, match="at least one gold box"):
        chain([])


@settings(deadline=None, max_examples=200)
@given(gold_sets, sizes, seeds)
def test_the_chain_leads_from_the_whole_image_to_the_gold_boxes(gold, size, seed):
    areas = chain(gold, size, seed)
    assert areas[0] == WHOLE
    assert areas[-1] == tuple(gold)
    assert areas == chain(gold, size, seed)
    assert len(areas) <= 5
    outliers = [area for area in areas if not contains(area, gold)]
    assert outliers == areas[1:2] or not outliers
    for area in outliers:
        assert len(area) == 1
        assert (pairwise_iou(as_boxes(area), as_boxes(gold)) < 0.001).all()
    steps = [Step(tuple(BoxDepth(box, 0.5) for box in area), "t") for area in areas]
    assert parse(render(steps, "a")).well_formed


@settings(deadline=None)
@given(gold_sets, sizes, st.integers(1, 6))
def test_the_allowed_steps_cover_the_image(gold, size, num_steps):
    boxes = tuple(gold)
    for steps_left in range(num_steps, 0, -1):
        boxes = expand_once(boxes, size, steps_left)
    assert boxes == WHOLE


def test_half_of_the_rows_with_room_have_a_distractor_of_about_the_target_size():
    gold = [(0.45, 0.45, 0.5, 0.5)]
    chains = [chain(gold, seed=seed) for seed in range(400)]
    distractors = [areas[1][0] for areas in chains if has_distractor(areas, gold)]
    assert 160 < len(distractors) < 240
    target = chains[0][-2][0]
    scales = [(box[2] - box[0]) / (target[2] - target[0]) for box in distractors]
    assert 0.83 < min(scales) < 0.9
    assert 1.4 < max(scales) < 1.57


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_a_share_of_none_or_all_leaves_nothing_to_chance(share):
    gold = [(0.45, 0.45, 0.5, 0.5)]
    assert {has_distractor(chain(gold, seed=seed, share=share), gold) for seed in range(100)} == {share == 1.0}


def test_where_no_box_of_the_expanded_size_fits_the_distractor_is_of_about_the_gold_size():
    gold = [(0.05, 0.0, 0.12, 0.9), (0.6, 0.0, 0.67, 0.9)]
    # Grown by 0.88 / 5 they leave 0.154 of the width at the right and 0.128 between them.
    for seed in range(20):
        ((x1, _, x2, _),) = chain(gold, seed=seed, share=1.0)[1]
        assert 0.07 * 1.2 * 0.7 - 0.001 <= x2 - x1 <= 0.07 * 1.2 * 1.3 + 0.001
        assert x1 > 0.846 or (x1 > 0.295 and x2 < 0.425)
