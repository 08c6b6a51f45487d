"""HIoU: the paper's formula, against SciPy and shapely, and against reward hacking."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import shapely
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

from sif_jax.rewards import hiou
from sif_jax.rewards.geometry import batched_hiou
from sif_jax.rewards.packing import to_units

MAX_BOXES = 8


def shapely_hiou(pred, gold, denominator=min):
    """The formula again, by other means."""
    if not pred or not gold:
        return float(len(pred) == len(gold))
    p, g = (
        [shapely.box(*box) if box[0] < box[2] and box[1] < box[3] else shapely.Polygon() for box in boxes]
        for boxes in (pred, gold)
    )
    iou = lambda a, b: a.intersection(b).area / a.union(b).area if a.union(b).area > 0 else 0.0  # noqa: E731
    pairs = np.array([[iou(a, b) for b in g] for a in p])
    paired = pairs[linear_sum_assignment(-pairs)].sum() / denominator(len(p), len(g))
    return (iou(shapely.union_all(p), shapely.union_all(g)) + paired) / 2


def jitted_hiou(cases, num_boxes=MAX_BOXES, *, denominator="min"):
    def pad(box_sets):
        boxes, mask = np.zeros((len(box_sets), num_boxes, 4)), np.zeros((len(box_sets), num_boxes), bool)
        for row, box_set in enumerate(box_sets):
            mask[row, : len(box_set)] = True
            boxes[row, : len(box_set)] = np.array(box_set).reshape(-1, 4)
        return jnp.asarray(to_units(boxes)), jnp.asarray(mask)

    preds, golds = zip(*cases)
    return np.asarray(jax.jit(batched_hiou)(*pad(preds), *pad(golds), count_all=denominator == "max"))


def random_cases(rng, count):
    """Up to 8 boxes a side, a third of them on a coarse grid (so equal, touching, flat), some copied from gold."""

    def boxes(n):
        points = rng.random((n, 2, 2)) if rng.random() < 0.67 else rng.integers(0, 5, (n, 2, 2)) / 4
        points = np.round(points, 3)
        return np.concatenate([points.min(axis=1), points.max(axis=1)], axis=1).tolist()

    for _ in range(count):
        gold = boxes(rng.integers(0, MAX_BOXES + 1))
        copied = gold[: rng.integers(0, len(gold) + 1)]
        yield (copied + boxes(rng.integers(0, MAX_BOXES + 1)))[:MAX_BOXES], gold


CASES = list(random_cases(np.random.default_rng(0), 400))
HALF = [0.0, 0.0, 0.5, 1.0]


def test_one_box_of_half_the_gold_area_scores_a_half():
    assert hiou([HALF], [[0, 0, 1, 1]]) == 0.5


def test_global_and_paired_iou_are_averaged():
    # Union 0.5 of 1; the best matching pairs the left half with itself: (0.5 + 1) / 2.
    assert hiou([HALF], [HALF, [0.5, 0.0, 1.0, 1.0]]) == 0.75
    assert hiou([HALF], [HALF, [0.5, 0.0, 1.0, 1.0]], pair_denominator="max") == 0.5


def test_the_matching_is_optimal_not_greedy():
    pred = [[0.0, 0.0, 0.6, 1.0], [0.0, 0.0, 0.4, 1.0]]
    gold = [[0.0, 0.0, 0.5, 1.0], [0.2, 0.0, 0.7, 1.0]]
    # Greedy takes 0.5/0.6 first and leaves 0.2/0.7; the optimum is 0.4/0.5 + 0.4/0.7.
    assert hiou(pred, gold) == pytest.approx((0.6 / 0.7 + (0.8 + 4 / 7) / 2) / 2)


@pytest.mark.parametrize("denominator", ["min", "max"])
def test_hiou_is_that_of_shapely_and_scipy(denominator):
    expected = [shapely_hiou(pred, gold, min if denominator == "min" else max) for pred, gold in CASES]
    exact = [hiou(pred, gold, pair_denominator=denominator) for pred, gold in CASES]
    np.testing.assert_allclose(exact, expected, atol=1e-9)
    np.testing.assert_allclose(jitted_hiou(CASES, denominator=denominator), expected, atol=1e-6)


thousandth = st.integers(0, 1000).map(lambda n: n / 1000)
any_boxes = st.lists(st.tuples(thousandth, thousandth, thousandth, thousandth), max_size=MAX_BOXES)


@settings(deadline=None, max_examples=60)
@given(any_boxes, any_boxes)
def test_hiou_is_symmetric_bounded_and_never_nan_even_for_inverted_boxes(pred, gold):
    value = hiou(pred, gold)
    assert 0 <= value <= 1
    assert value == pytest.approx(hiou(gold, pred))
    assert value == pytest.approx(jitted_hiou([(pred, gold)])[0], abs=1e-6)


def test_pixel_boxes_and_normalised_boxes_score_the_same():
    pred, gold = [[10, 20, 300, 400]], [[12, 25, 280, 410]]
    assert hiou(pred, gold) == pytest.approx(hiou(np.array(pred) / 480, np.array(gold) / 480))


def test_empty_sets_agree_only_with_each_other():
    assert (hiou([], []), hiou([], [HALF]), hiou([HALF], [])) == (1, 0, 0)


def test_a_box_without_area_scores_nothing():
    assert hiou([[0.5, 0.5, 0.5, 0.5]], [[0.5, 0.5, 0.5, 0.5]]) == 0
    assert hiou([[0.9, 0.9, 0.1, 0.1]], [[0.1, 0.1, 0.9, 0.9]]) == 0


@pytest.mark.parametrize("wrong", [[[0.0, 0.0, 1.0]], [[0.0, 0.0, float("nan"), 1.0]]])
def test_what_is_not_a_box_is_refused(wrong):
    with pytest.raises(ValueError, match="expected boxes"):
        hiou(wrong, [HALF])


GOLD = [[0.1, 0.1, 0.3, 0.3], [0.5, 0.1, 0.7, 0.3], [0.1, 0.6, 0.3, 0.8]]
HACKS = {
    "exact": (GOLD, 1.0, 1.0),
    "two dropped": (GOLD[:1], (1 / 3 + 1) / 2, 1 / 3),
    "each one twice": (GOLD * 2, 1.0, 0.75),
    "two specks added": ([*GOLD, [0.9, 0.9, 0.91, 0.91], [0.95, 0.9, 0.96, 0.91]], (0.12 / 0.1202 + 1) / 2, 0.799),
    "the whole image": ([[0.0, 0.0, 1.0, 1.0]], (0.12 + 0.04) / 2, (0.12 + 0.04 / 3) / 2),
    "a flat box": ([[0.1, 0.1, 0.1, 0.3]], 0.0, 0.0),
}


@pytest.mark.parametrize("name", HACKS)
def test_the_hardened_denominator_sees_the_hacks_that_the_paper_formula_rewards(name):
    pred, paper, hardened = HACKS[name]
    assert hiou(pred, GOLD) == pytest.approx(paper, abs=1e-3)
    assert hiou(pred, GOLD, pair_denominator="max") == pytest.approx(hardened, abs=1e-3)
