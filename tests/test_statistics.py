"""Bootstrap intervals over scenes, the summary of an evaluation, and its table."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from sif_jax.errors import InputError
from sif_jax.evals.statistics import METRICS, Summary, bootstrap_interval, summarise
from sif_jax.evals.table import markdown_table, text_table


def sample(scene="s0", family="position", total=1.0, judge=1.0, depth_consistency: float | None = 1.0):
    scores = {"format": 1.0, "hiou_last": 0.5, "hiou_gain": 0.25, "depth_consistency": depth_consistency}
    return {"scene": scene, "family": family, "judge": judge, "scores": scores | {"total": total}}


def test_two_scenes_of_unequal_size_give_the_means_of_their_three_possible_draws():
    interval = bootstrap_interval([0.0, 0.0, 0.0, 1.0], ["a", "a", "a", "b"], resamples=400, seed=0)
    assert interval.mean == 0.25
    assert (interval.low, interval.high) == (0.0, 1.0)  # a+a and b+b, each a quarter of the draws
    assert (interval.questions, interval.scenes) == (4, 2)
    middle = bootstrap_interval([0.0, 0.0, 0.0, 1.0], ["a", "a", "a", "b"], confidence=0.1, resamples=400, seed=0)
    assert (middle.low, middle.high) == (0.25, 0.25)  # a+b, half of the draws


def test_with_one_question_per_scene_the_interval_is_that_of_scipy():
    values = np.random.default_rng(1).gamma(2.0, size=60)
    ours = bootstrap_interval(values, np.arange(60), confidence=0.9, resamples=20_000, seed=2)
    oracle = stats.bootstrap(
        (values,), np.mean, method="percentile", confidence_level=0.9, n_resamples=20_000, rng=np.random.default_rng(3)
    ).confidence_interval
    width = oracle.high - oracle.low
    assert ours.low == pytest.approx(oracle.low, abs=0.03 * width)
    assert ours.high == pytest.approx(oracle.high, abs=0.03 * width)


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    """40 scenes of 5 questions that share the scene's difficulty: ignoring the scenes covers only about 60 %."""
    rng = np.random.default_rng(4)
    scenes = np.repeat(np.arange(40), 5)

    def covers(clusters):
        values = rng.normal(size=40)[scenes] + rng.normal(size=200) * 0.5
        interval = bootstrap_interval(values, clusters, resamples=300, seed=5)
        return interval.low <= 0 <= interval.high

    assert 0.89 <= np.mean([covers(scenes) for _ in range(300)]) <= 0.98
    assert np.mean([covers(np.arange(200)) for _ in range(300)]) <= 0.8


@settings(deadline=None, max_examples=50)
@given(
    st.lists(st.tuples(st.floats(-5, 5), st.integers(0, 6)), min_size=1, max_size=30),
    st.permutations(range(30)),
)
def test_the_interval_is_ordered_within_the_data_and_blind_to_the_order_of_the_questions(rows, order):
    values, clusters = zip(*rows)
    interval = bootstrap_interval(values, clusters, resamples=100, seed=0)
    assert min(values) - 1e-9 <= interval.low <= interval.high <= max(values) + 1e-9
    shuffled, shuffled_clusters = zip(*(rows[i] for i in order if i < len(rows)))
    again = bootstrap_interval(shuffled, shuffled_clusters, resamples=100, seed=0)
    assert (again.low, again.high) == pytest.approx((interval.low, interval.high))


def test_many_clusters_are_drawn_in_blocks_with_the_same_number_of_resamples(monkeypatch):
    values = np.arange(50.0)
    whole = bootstrap_interval(values, values, resamples=203, seed=6)
    monkeypatch.setattr("sif_jax.evals.statistics.DRAWS_AT_ONCE", 120)
    assert bootstrap_interval(values, values, resamples=203, seed=6) == whole


@pytest.mark.parametrize(
    ("values", "clusters", "message"),
    [([], [], "no values"), ([1.0, np.nan], [0, 1], "nan"), ([1.0], [0, 1], "clusters")],
)
def test_values_that_have_no_interval_are_refused(values, clusters, message):
    with pytest.raises(InputError, match=message):
        bootstrap_interval(values, clusters, seed=0)


def test_an_evaluation_without_samples_is_refused():
    with pytest.raises(InputError, match="no samples"):
        summarise([])


def test_the_summary_averages_each_metric_over_all_questions_and_per_family():
    summary = summarise(
        [
            sample("a", "position", total=4.0, judge=1.0),
            sample("a", "counting", total=1.0, judge=0.0, depth_consistency=None),
            sample("b", "counting", total=3.0, judge=0.5, depth_consistency=None),
        ]
    )
    assert (summary.questions, summary.scenes) == (3, 2)
    assert summary.metrics["answer_accuracy"].mean == 0.5
    assert summary.metrics["total_reward"].mean == pytest.approx(8 / 3)
    assert summary.metrics["depth_consistency"].questions == 1
    assert list(summary.families) == ["counting", "position"]
    assert summary.families["counting"]["total_reward"].mean == 2.0
    assert "depth_consistency" not in summary.families["counting"]


def test_a_summary_survives_json():
    summary = summarise([sample("a"), sample("b", judge=0.0)])
    assert Summary.from_json(json.loads(json.dumps(summary.to_json()))) == summary


def test_the_text_table_is_aligned_within_140_columns_and_marks_what_was_not_measured():
    summary = summarise([sample("a", depth_consistency=None), sample("b", judge=0.0, depth_consistency=None)])
    header, rule, *rows, _, note = text_table({"untrained": summary, "SFT + GRPO-SIF": summary}).splitlines()
    assert len(rows) == 2
    assert {len(line) for line in (header, rule, *rows)} == {len(rule)}
    assert len(rule) <= 140
    assert "0.50 [0.00, 1.00]" in rows[0]
    assert "–" in rows[0]
    assert "scenes" in note


def test_every_row_of_the_markdown_table_has_the_same_number_of_cells():
    lines = markdown_table({"SFT": summarise([sample("a")])}).splitlines()[:3]
    assert {line.count("|") for line in lines} == {len(METRICS) + 3}
