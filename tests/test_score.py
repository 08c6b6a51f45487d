"""The reward terms on hand-made traces: the paper's rules, and each difference of the release."""

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import sif_jax.rewards
from sif_jax.errors import InputError
from sif_jax.rewards import hiou, score
from sif_jax.rewards.scoring import MAX_BOXES
from sif_jax.sif.record import Frame, Record

WHOLE = (0.0, 0.0, 1.0, 1.0)
LEFT = (0.0, 0.0, 0.5, 1.0)
QUARTER = (0.0, 0.0, 0.5, 0.5)
# Depth 0 in the left half, 0.5 in the right: the whole image has 0.25, the left half 0.
DEPTH = np.repeat(np.array([[0.0, 0.5]], np.float32), 2, axis=0)


def record(*gold_boxes, frame: Frame = "normalised"):
    return Record(
        dataset="d", image="i.png", depth_image="d.png", problem="Q", gold_boxes=gold_boxes, response="A", frame=frame
    )


def pair(box, depth="0.500"):
    return f'{{"bbox_2d":[{",".join(f"{v:.3f}" for v in box)}],"depth":{depth}}}'


def trace(*areas, answer="a"):
    steps = "".join(f"<area>[{','.join(area)}]</area><text>t</text>" for area in areas)
    return f"<think>{steps}</think><answer>{answer}</answer>"


def one(completion, gold=(LEFT,), judge=0.5, previous=None, depth_map=None, **options):
    scores = score(
        [completion],
        [record(*gold)],
        judge_scores=[judge],
        previous_means=[previous],
        depth_maps=[depth_map],
        **options,
    )
    return {name: values[0] for name, values in vars(scores).items()}


def test_a_good_trace_earns_every_term():
    completion = trace([pair(WHOLE, "0.250")], [pair(QUARTER, "0.000")], [pair(LEFT, "0.000")])
    scores = one(completion, judge=0.75, previous=0.5, depth_map=DEPTH)
    assert scores["format"] == 1
    assert scores["answer"] == 0.75 + 0.25
    assert (scores["hiou_first"], scores["hiou_last"], scores["hiou_gain"]) == (0.5, 1.0, 0.5)
    assert scores["bbox"] == 1.5
    assert (scores["depth"], scores["depth_consistency"]) == (1, 1)
    assert scores["total"] == 1 + 1 + 1.5 + 1
    assert (scores["num_areas"], scores["num_cut_boxes"]) == (3, 0)
    assert scores["valid"]
    assert scores["well_formed"]


def test_the_first_visit_has_no_bonus():
    assert one(trace([pair(LEFT)]), judge=0.5, previous=None)["answer"] == 0.5
    assert one(trace([pair(LEFT)]), judge=0.5, previous=float("nan"))["answer"] == 0.5
    assert score([trace([pair(LEFT)])], [record(LEFT)], judge_scores=[0.5]).answer[0] == 0.5


def test_a_loss_of_progress_is_a_penalty_in_the_paper_and_clipped_in_the_release():
    worse = trace([pair(LEFT)], [pair(QUARTER)])
    paper, release = (one(worse, judge=0.25, previous=0.75, compat=compat) for compat in ("paper", "release"))
    assert (paper["answer"], paper["bbox"]) == (0.25 - 0.5, 0.5 - 0.5)
    assert (release["answer"], release["bbox"]) == (0.25, 0.5)


def test_a_gain_counts_the_same_in_the_paper_and_the_release():
    better = trace([pair(QUARTER)], [pair(LEFT)])
    paper, release = (one(better, judge=0.75, previous=0.25, compat=compat) for compat in ("paper", "release"))
    assert (paper["answer"], paper["bbox"]) == (release["answer"], release["bbox"]) == (1.25, 1.5)


def test_a_trace_that_only_looks_at_the_whole_image_has_no_progress():
    scores = one(trace([pair(WHOLE)], [pair(WHOLE)]))
    assert (scores["hiou_first"], scores["hiou_last"], scores["bbox"]) == (0.5, 0.5, 0.5)


def test_nothing_readable_scores_nothing():
    scores = one("I think it is red.", judge=0.0, depth_map=DEPTH)
    assert all(scores[name] == 0 for name in ("format", "bbox", "depth", "total", "num_areas", "depth_consistency"))


def test_the_last_readable_area_counts_where_the_last_one_is_cut_off():
    cut = trace([pair(QUARTER)], [pair(LEFT)]).partition("</think>")[0] + '<area>[{"bbox_2d":[0.1,'
    scores = one(cut)
    assert (scores["format"], scores["bbox"]) == (0, 1.5)


DEPTH_CASES = {
    "within a tenth": ([pair(WHOLE, "0.275")], 1, 1, 1),
    "beyond a tenth": ([pair(WHOLE, "0.276")], 0, 0, 0),
    "exactly zero at mean zero": ([pair(LEFT, "0.000")], 1, 1, 1),
    "not zero at mean zero": ([pair(LEFT, "0.001")], 0, 0, 0),
    "one of two right": ([pair(WHOLE, "0.250"), pair(LEFT, "0.900")], 0, 0.5, 0.5),
    "no number": ([pair(WHOLE, "null"), pair(LEFT, "0.000")], 0, 0.5, 0.5),
    "a box that cannot be read": ([pair(LEFT, "0.000"), pair((0.5, 0.5, 0.5, 0.5), "0.500")], 0, 1, 1),
}


@pytest.mark.parametrize("name", DEPTH_CASES)
def test_depth_is_all_or_nothing_in_the_paper_and_fractional_in_the_release(name):
    area, paper, release, consistency = DEPTH_CASES[name]
    assert one(trace(area), depth_map=DEPTH)["depth"] == paper
    assert one(trace(area), depth_map=DEPTH, compat="release")["depth"] == release
    assert one(trace(area), depth_map=DEPTH)["depth_consistency"] == consistency


def test_without_a_depth_map_the_depth_term_is_zero():
    assert one(trace([pair(LEFT, "0.000")]))["depth"] == 0


LENIENT = {
    "text outside the tags": "Sure. " + trace([pair(LEFT)]),
    "an empty area": trace([pair(LEFT)], []),
    "depth true": trace([pair(LEFT, "true")]),
    "another key": trace([pair(LEFT).replace("}", ',"label":"cup"}')]),
}
REFUSED_BY_BOTH = {
    "no answer": trace([pair(LEFT)]).partition("<answer>")[0],
    "an empty answer": trace([pair(LEFT)], answer=""),
    "an inverted box": trace([pair((0.5, 0.0, 0.0, 1.0))]),
    "four decimals": trace([pair(LEFT, "0.5000")]),
}


@pytest.mark.parametrize("name", LENIENT)
def test_the_release_accepts_a_format_that_the_paper_does_not(name):
    assert one(LENIENT[name])["format"] == 0
    assert one(LENIENT[name], compat="release")["format"] == 1


@pytest.mark.parametrize("name", REFUSED_BY_BOTH)
def test_the_release_does_not_accept_everything(name):
    assert one(REFUSED_BY_BOTH[name], compat="release")["format"] == 0


def test_a_failed_judgement_is_masked_and_free_of_nan():
    scores = score([trace([pair(LEFT)])] * 2, [record(LEFT)] * 2, judge_scores=[float("nan"), 1.0])
    np.testing.assert_array_equal(scores.valid, [False, True])
    np.testing.assert_array_equal(scores.total, [0, 1 + 1 + 1])
    assert not any(np.isnan(values).any() for values in vars(scores).values())


def test_the_hardened_denominator_reaches_the_box_term():
    both = trace([pair(LEFT), pair((0.9, 0.9, 0.901, 0.901))])
    assert one(both)["bbox"] > one(both, pair_denominator="max")["bbox"] + 0.2


def test_boxes_beyond_the_largest_bucket_are_cut_and_counted():
    many = [pair(LEFT), *[pair(QUARTER)] * (MAX_BOXES + 2)]
    scores = one(trace([pair(WHOLE)], many))
    assert scores["num_cut_boxes"] == 3
    assert scores["hiou_last"] == 1


coordinate = st.integers(0, 1000).map(lambda n: n / 1000)
areas = st.lists(st.tuples(coordinate, coordinate, coordinate, coordinate), min_size=1, max_size=4)
gold_set = st.lists(st.sampled_from([WHOLE, LEFT, QUARTER, (0.3, 0.3, 0.301, 0.9)]), min_size=1, max_size=4)


@settings(deadline=None, max_examples=40)
@given(st.lists(areas, min_size=1, max_size=4), gold_set)
def test_the_box_term_is_that_of_the_exact_hiou(drawn, gold):
    # Inverted boxes are no boxes.
    readable = [[box for box in area if box[0] < box[2] and box[1] < box[3]] for area in drawn]
    readable = [area for area in readable if area]
    focused = [area for area in readable if set(area) != {WHOLE}]
    last = hiou(readable[-1], gold) if readable else 0
    first = hiou(focused[0], gold) if focused else last
    scores = one(trace(*[[pair(box) for box in area] for area in drawn]), gold=gold)
    assert scores["bbox"] == pytest.approx(last + last - first, abs=3e-6)


def test_an_empty_batch_gives_empty_scores():
    assert score([], [], judge_scores=[]).total.shape == (0,)


def test_records_that_cannot_be_rewarded_are_refused():
    completion = trace([pair(LEFT)])
    with pytest.raises(InputError, match="row 1: the number of gold boxes"):
        score([completion], [record()], judge_scores=[1.0])
    with pytest.raises(InputError, match="row 2: gold boxes are in the wrong frame; got 'pixel'"):
        score([completion] * 2, [record(LEFT), record(LEFT, frame="pixel")], judge_scores=[1.0, 1.0])
    for wrong in ((0.0, 0.0, 1.5, 1.0), (0.0, 0.0, float("nan"), 1.0)):
        with pytest.raises(InputError, match="row 1: a gold box is outside the image"):
            score([completion], [record(wrong)], judge_scores=[1.0])
    with pytest.raises(InputError, match="judge_scores does not match the completions; got 2; expected 1"):
        score([completion], [record(LEFT)], judge_scores=[1.0, 1.0])


def test_the_host_modules_and_hiou_do_not_import_jax():
    code = (
        "import sys, sif_jax.rewards as rewards, sif_jax.judge.rule, sif_jax.sif.expansion, sif_jax.sif.depth_codec\n"
        "rewards.hiou([[0, 0, 1, 1]], [])\n"
        "assert 'jax' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_an_unknown_name_of_the_rewards_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'hiuo'"):
        sif_jax.rewards.hiuo  # noqa: B018
