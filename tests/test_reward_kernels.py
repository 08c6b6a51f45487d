"""The compiled rewards: against shapely, SciPy and float64, on random, degenerate and hostile input."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import shapely
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

from sif_jax.config import RewardsConfig
from sif_jax.errors import InputError
from sif_jax.rewards import score
from sif_jax.rewards.advantages import advantages
from sif_jax.rewards.depth_means import box_means
from sif_jax.rewards.geometry import batched_hiou
from sif_jax.rewards.packing import MAX_AREAS, to_units
from sif_jax.rewards.scoring import Scores
from sif_jax.rewards.terms import reward_terms
from sif_jax.sif.depth_codec import box_mean_depth, pixel_windows
from sif_jax.sif.grammar import BoxDepth, Step, render
from sif_jax.sif.record import Record

WHOLE, LEFT, RIGHT = (0.0, 0.0, 1.0, 1.0), (0.0, 0.0, 0.5, 1.0), (0.5, 0.0, 1.0, 1.0)
MAX_BOXES = 32


def shapely_hious(pred, gold):
    """HIoU over the smaller and over the larger number of boxes."""
    if len(pred) == 0 or len(gold) == 0:
        return (float(len(pred) == len(gold)),) * 2
    p, g = (np.array([polygon(box) for box in boxes]) for boxes in (pred, gold))
    intersection = shapely.area(shapely.intersection(p[:, None], g[None]))
    union = shapely.area(p)[:, None] + shapely.area(g)[None] - intersection
    pairs = np.divide(intersection, union, out=np.zeros_like(union), where=union > 0)
    matched = pairs[linear_sum_assignment(-pairs)].sum()
    a, b = shapely.union_all(p), shapely.union_all(g)
    either = a.union(b).area
    overall = a.intersection(b).area / either if either > 0 else 0.0
    return tuple((overall + matched / count(len(p), len(g))) / 2 for count in (min, max))


def polygon(box):
    return shapely.box(*box) if box[0] < box[2] and box[1] < box[3] else shapely.Polygon()


def random_boxes(rng, count):
    """In thousandths, in full precision, on a coarse grid (equal, touching, flat), or partly outside the image."""
    kind = rng.integers(4)
    points = rng.random((count, 2, 2)) if kind != 1 else rng.integers(0, 5, (count, 2, 2)) / 4
    low, high = points.min(axis=1), points.max(axis=1)
    if kind == 1:
        return np.concatenate([low, high], axis=1)
    boxes = np.concatenate([low, np.maximum(high, low + 0.002)], axis=1)
    return {0: np.round(boxes, 3), 2: boxes, 3: 2 * boxes - 0.5}[int(kind)]


def random_case(rng):
    gold = random_boxes(rng, rng.integers(0, MAX_BOXES + 1))
    copied = gold[: rng.integers(0, len(gold) + 1)]
    nested = np.concatenate([copied[:, :2] * 0.75 + copied[:, 2:] * 0.25, copied[:, 2:]], axis=1)
    pred = np.concatenate([rng.permutation(np.concatenate([copied, nested])), random_boxes(rng, rng.integers(0, 9))])
    pred = pred[: rng.integers(0, MAX_BOXES + 1)]
    inverted = rng.random(len(pred)) < 0.05
    pred[inverted] = pred[inverted][:, [2, 3, 0, 1]]
    return pred, gold


def padded(box_sets):
    boxes, mask = np.zeros((len(box_sets), MAX_BOXES, 4)), np.zeros((len(box_sets), MAX_BOXES), bool)
    for row, box_set in enumerate(box_sets):
        boxes[row, : len(box_set)], mask[row, : len(box_set)] = box_set, True
    return jnp.asarray(to_units(boxes)), jnp.asarray(mask)


def check_against_shapely(measured, num_cases, claim):
    rng = np.random.default_rng(0)
    cases = [random_case(rng) for _ in range(num_cases)]
    expected = np.array([shapely_hious(*case) for case in cases]).T
    preds, golds = zip(*cases)
    for denominator, reference in zip((False, True), expected):
        hiou = np.concatenate(
            [
                np.asarray(
                    jax.jit(batched_hiou)(
                        *padded(preds[first : first + 200]), *padded(golds[first : first + 200]), count_all=denominator
                    )
                )
                for first in range(0, num_cases, 200)
            ]
        )
        assert np.isfinite(hiou).all()
        measured(
            f"{claim}, over the {'larger' if denominator else 'smaller'} count",
            abs(hiou - reference).max(),
            at_most=1e-6,
        )


def test_hiou_of_boxes_of_every_kind_is_that_of_shapely_and_scipy(measured):
    check_against_shapely(measured, 600, "HIoU of 600 random cases of 0 to 32 boxes against shapely and SciPy")


@pytest.mark.slow
def test_hiou_of_ten_thousand_cases_is_that_of_shapely_and_scipy(measured):
    check_against_shapely(measured, 10_000, "HIoU of 10,000 random cases of 0 to 32 boxes against shapely and SciPy")


def test_more_rows_than_fit_at_once_are_done_in_turns():
    boxes = jnp.asarray(to_units(np.tile(np.array(LEFT), (8192, 1, 1))))
    mask = jnp.arange(8192)[:, None] % 2 == 0
    gold = jnp.ones((8192, 1), bool)
    np.testing.assert_array_equal(batched_hiou(boxes, mask, boxes, gold), np.arange(8192) % 2 == 0)


def means_of(depth_maps, boxes):
    """Mean depth of every box in every map, compiled and exact."""
    height, width = (max(depth.shape[axis] for depth in depth_maps) for axis in (0, 1))
    stacked = np.zeros((len(depth_maps), -(-height // 8) * 8, -(-width // 8) * 8), np.float32)
    for number, depth in enumerate(depth_maps):
        stacked[number, : depth.shape[0], : depth.shape[1]] = depth
    windows = [pixel_windows(boxes, np.array(depth.shape[::-1])) for depth in depth_maps]
    index = np.repeat(np.arange(len(depth_maps)), len(boxes))
    means = jax.jit(box_means)(jnp.asarray(stacked), jnp.asarray(index), jnp.asarray(np.concatenate(windows)))
    exact = [box_mean_depth(depth, tuple(box)) for depth in depth_maps for box in boxes]
    return np.asarray(means), np.array([0.0 if mean is None else mean for mean in exact])


def test_mean_depths_are_those_of_float64(measured):
    rng = np.random.default_rng(0)
    sizes = [(512, 512), (333, 500), (97, 8), (1, 1)]
    maps = [rng.random(size, np.float32) ** power for size, power in zip(sizes, (1, 4, 1, 1))]
    points = np.sort(rng.random((500, 2, 2)) ** rng.choice([1, 5], (500, 1, 2)), axis=1)
    boxes = np.concatenate([points.reshape(-1, 4), [WHOLE, LEFT, (0.2, 0.2, 0.2, 0.9), (0.999, 0.999, 1.0, 1.0)]])
    means, exact = means_of(maps, boxes)
    measured("mean depth in 2,016 boxes against float64", abs(means - exact).max(), at_most=1e-6)


def test_the_sums_of_a_large_map_do_not_overflow():
    means, _ = means_of([np.ones((4088, 2048), np.float32)], np.array([WHOLE, RIGHT, (0.1, 0.1, 0.9, 0.9)]))
    np.testing.assert_allclose(means, 1, atol=1e-7)


def record(*gold_boxes):
    return Record(dataset="d", image="i.png", depth_image="d.png", problem="Q", gold_boxes=gold_boxes, response="A")


def trace(*boxes, depth=0.5):
    return render([Step((BoxDepth(box, depth),), "t") for box in boxes], "a")


def test_every_area_has_its_hiou():
    scores = score([trace(WHOLE, RIGHT, LEFT)], [record(LEFT)], judge_scores=[1.0])
    np.testing.assert_array_equal(scores.hious[0, :4], [0.5, 0.0, 1.0, 0.0])


def test_of_too_many_areas_the_first_ones_and_the_last_are_kept():
    area = '<area>[{{"bbox_2d":[{},0,{},1],"depth":0.5}}]'
    many = area.format(0.5, 1) * (MAX_AREAS + 9) + area.format(0, 0.5)
    scores = score([many], [record(LEFT)], judge_scores=[1.0], depth_maps=[np.full((4, 4), 0.5)])
    assert (scores.hiou_first[0], scores.hiou_last[0], scores.num_cut_boxes[0]) == (0, 1, 10)
    # What was cut does not agree.
    assert (scores.depth[0], scores.depth_consistency[0]) == (0, pytest.approx(MAX_AREAS / (MAX_AREAS + 10)))
    few = score([trace(*[RIGHT] * 9, LEFT)], [record(LEFT)], judge_scores=[1.0])
    assert (few.hiou_first[0], few.hiou_last[0], few.num_cut_boxes[0]) == (0, 1, 0)


def test_completions_of_one_group_share_their_depth_map():
    near, far = np.full((3, 5), 0.1, np.float32), np.full((300, 200), 0.5, np.float32)
    scores = score([trace(LEFT)] * 4, [record(LEFT)] * 4, judge_scores=[1.0] * 4, depth_maps=[near, far, None, far])
    np.testing.assert_array_equal(scores.depth, [0, 1, 0, 1])


def test_a_depth_map_beyond_the_largest_side_is_refused():
    with pytest.raises(InputError, match="a depth map is too large; got 4089"):
        score([trace(LEFT)], [record(LEFT)], judge_scores=[1.0], depth_maps=[np.zeros((1, 4089), np.float32)])


def test_batches_of_like_size_share_one_program():
    score([trace(LEFT)] * 3, [record(LEFT)] * 3, judge_scores=[1.0] * 3)
    programs = reward_terms._cache_size()
    for count, settings_ in ((1, {"compat": "release"}), (16, {"pair_denominator": "max"}), (7, {"bbox": 0.0})):
        score(
            [trace(*[LEFT] * (count % 8 + 1))] * count, [record(LEFT)] * count, judge_scores=[1.0] * count, **settings_
        )
    assert reward_terms._cache_size() == programs


def test_weights_and_progress_switches_make_the_total():
    completions, records = [trace(RIGHT, LEFT)], [record(LEFT)]
    earned = {"judge_scores": [0.75], "previous_means": [0.5], "depth_maps": [np.full((4, 4), 0.5, np.float32)]}
    scores = score(completions, records, **earned)
    assert [getattr(scores, term)[0] for term in ("format", "answer", "bbox", "depth", "total")] == [1, 1, 2, 1, 5]
    rewards = RewardsConfig(format=0.5, answer=2, bbox=0.25, depth=0, answer_progress=False, bbox_progress=False)
    plain = score(completions, records, **earned, rewards=rewards)
    assert [getattr(plain, term)[0] for term in ("format", "answer", "bbox", "depth")] == [1, 0.75, 1, 1]
    assert plain.total[0] == 0.5 + 2 * 0.75 + 0.25 * 1


def test_a_single_setting_goes_before_the_config():
    completions, records = [trace(RIGHT, LEFT)], [record(LEFT)]
    scores = score(completions, records, judge_scores=[0.0], rewards=RewardsConfig(format=0), bbox_progress=False)
    assert scores.total[0] == 1


def test_unknown_settings_and_a_reward_of_nothing_are_refused():
    with pytest.raises(ValueError, match="compatt"):
        score([], [], judge_scores=[], compatt="paper")
    with pytest.raises(ValueError, match="nothing is rewarded"):
        RewardsConfig(format=0, answer=0, bbox=0, depth=0)


def scores_with(num_completions, **terms):
    zeros = np.zeros(num_completions)
    given = {name: np.array(values, np.float64) for name, values in terms.items()}
    valid = given.pop("valid", np.ones(num_completions)).astype(bool)
    fields = dict.fromkeys(Scores.__dataclass_fields__, zeros) | given | {"valid": valid}
    total = sum(fields[term] for term in ("format", "answer", "bbox", "depth"))
    return Scores(
        **fields
        | {"total": total, "num_areas": zeros.astype(int), "num_cut_boxes": zeros.astype(int)}
        | {"hious": np.zeros((num_completions, 1)), "well_formed": valid}
    )


def test_terms_normalised_each_for_itself_weigh_the_same_whatever_their_spread():
    scores = scores_with(4, answer=[0, 2, 0, 2], bbox=[0, 0, 0.1, 0.1])
    by_total = advantages(scores, RewardsConfig(), num_samples=4, eps=0.0)
    per_term = advantages(scores, RewardsConfig(normalise="per_term", bbox=0.5), num_samples=4, eps=0.0)
    np.testing.assert_allclose(per_term, [[-1.5, 0.5, -0.5, 1.5]], atol=1e-5)
    assert abs(by_total[0, 1] - by_total[0, 3]) < 0.2


def test_a_failed_judgement_takes_no_part_in_any_term():
    scores = scores_with(4, answer=[0, 2, 9, 1], bbox=[1, 3, 50, 2], valid=[1, 1, 0, 1])
    per_term = advantages(scores, RewardsConfig(normalise="per_term"), num_samples=4, eps=0.0)
    np.testing.assert_allclose(per_term, [[-np.sqrt(6), np.sqrt(6), 0, 0]], atol=1e-5)


def test_without_division_by_the_deviation_advantages_are_only_centred():
    scores = scores_with(4, answer=[0, 2, 1, 1])
    np.testing.assert_allclose(
        advantages(scores, RewardsConfig(), num_samples=4, divide_by_std=False), [[-1, 1, 0, 0]], atol=1e-6
    )


pieces = st.sampled_from(
    [
        "<think>",
        "</think>",
        "<area>",
        "</area>",
        "<text>t</text>",
        "<answer>a</answer>",
        "[",
        "]",
        '{"bbox_2d":[0.1,0.2,0.3,0.4],"depth":0.5}',
        '{"bbox_2d":[0,0,1,1],"depth":1e-300}',
        '{"bbox_2d":[0.9,0.9,0.1,0.1],"depth":NaN}',
        '{"bbox_2d":[1e308,0,1,1],"depth":null}',
        ",",
        "\x00\ud800",
    ]
)
garbage = st.lists(pieces, max_size=25).map("".join)
awkward = st.sampled_from([float("nan"), float("inf"), 0.0, 1.0, -3.5, 0.3])
gold_sets = st.sampled_from([(LEFT,), ((0.5, 0.5, 0.5, 0.5),), ((0.9, 0.9, 0.1, 0.1), WHOLE)])
garbage_maps = st.sampled_from([None, np.zeros((3, 4), np.float32), np.full((2, 2), 7.0), np.full((5, 5), np.nan)])


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(garbage, awkward, awkward, gold_sets, garbage_maps), max_size=5), st.booleans())
def test_nothing_is_ever_nan(rows, release):
    completions, judged, previous, golds, maps = zip(*rows) if rows else ([],) * 5
    scores = score(
        completions,
        [record(*gold) for gold in golds],
        judge_scores=judged,
        previous_means=previous,
        depth_maps=maps,
        compat="release" if release else "paper",
    )
    assert all(np.isfinite(values).all() for values in vars(scores).values())
    assert all(len(values) == len(rows) for values in vars(scores).values())
