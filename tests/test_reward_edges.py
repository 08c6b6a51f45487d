"""The edges listed in docs/rewards.md: each has a defined result or a clear error, and none is NaN."""

import jax.numpy as jnp
import numpy as np
import pytest

from sif_jax.config import GrpoConfig, RewardsConfig
from sif_jax.errors import InputError
from sif_jax.rewards import score
from sif_jax.rewards.advantages import advantages, group_advantages
from sif_jax.rewards.scoring import Scores
from sif_jax.sif.boxes import Box
from sif_jax.sif.grammar import BoxDepth, Step, render
from sif_jax.sif.record import Record
from tests.tiny_run import tiny_config

LEFT: Box = (0.0, 0.0, 0.5, 1.0)
POINT: Box = (0.5, 0.5, 0.5, 0.5)


def record(*gold_boxes: Box) -> Record:
    return Record(dataset="d", image="i.png", depth_image="d.png", problem="Q", gold_boxes=gold_boxes, response="A")


def look(box: Box, depth: float) -> str:
    return render([Step((BoxDepth(box, depth),), "t")], "a")


def scored(completions: list[str], *gold_boxes: Box, **options) -> Scores:
    scores = score(
        completions, [record(*gold_boxes)] * len(completions), judge_scores=[0.5] * len(completions), **options
    )
    assert all(np.isfinite(values).all() for values in vars(scores).values())
    return scores


def test_a_group_of_one_is_refused_by_the_config(tmp_path):
    with pytest.raises(InputError, match="num_samples"):
        tiny_config(GrpoConfig, tmp_path, "num_samples=1")


def test_a_group_with_one_judged_completion_teaches_nothing():
    valid = jnp.array([[True, False, False]])
    np.testing.assert_array_equal(group_advantages(jnp.array([[3.0, 0.0, 0.0]]), valid), 0)
    np.testing.assert_array_equal(group_advantages(jnp.array([[3.0]]), jnp.array([[True]])), 0)


@pytest.mark.parametrize("normalise", ["total", "per_term"])
def test_equal_completions_teach_nothing(normalise):
    scores = scored([look(LEFT, 0.3)] * 4, LEFT)
    np.testing.assert_array_equal(advantages(scores, RewardsConfig(normalise=normalise), num_samples=4), 0)


@pytest.mark.parametrize("compat", ["paper", "release"])
@pytest.mark.parametrize("completion", ["", " \n", "<think></think>", "<think><area>[]</area>", "\x00", "\ud800"])
def test_a_completion_without_content_earns_its_answers_score_alone(completion, compat):
    scores = scored([completion], LEFT, compat=compat, depth_maps=[np.full((4, 4), 0.5, np.float32)])
    assert (scores.format[0], scores.bbox[0], scores.depth[0], scores.num_areas[0]) == (0, 0, 0, 0)
    assert scores.total[0] == scores.answer[0] == 0.5


@pytest.mark.parametrize("denominator", ["min", "max"])
def test_a_gold_box_without_area_overlaps_nothing(denominator):
    alone = scored([look(LEFT, 0.5)], POINT, pair_denominator=denominator)
    assert (alone.hiou_last[0], alone.bbox[0]) == (0, 0)
    # Beside a real one it only counts as a box, where boxes are counted.
    both = scored([look(LEFT, 0.5)], LEFT, POINT, pair_denominator=denominator)
    assert both.hiou_last[0] == pytest.approx({"min": 1.0, "max": 0.75}[denominator])


@pytest.mark.parametrize(("depth", "expected"), [(0.0, 1), (0.001, 0), (1.0, 0)])
def test_in_a_depth_map_of_zeros_only_zero_is_right(depth, expected):
    scores = scored([look(LEFT, depth)], LEFT, depth_maps=[np.zeros((4, 4), np.float32)])
    assert scores.depth[0] == scores.depth_consistency[0] == expected


def test_a_record_without_gold_boxes_is_refused():
    with pytest.raises(InputError, match="row 1: the number of gold boxes cannot be rewarded; got 0"):
        scored([look(LEFT, 0.5)])


def test_a_gold_box_outside_the_image_is_refused():
    with pytest.raises(InputError, match="row 1: a gold box is outside the image"):
        scored([look(LEFT, 0.5)], (0.0, 0.0, 1.5, 1.0))
