"""Tricks that earn without solving: none pays under the hardened rewards, and those that the paper's formula pays are known."""

import json

import pytest
from click.testing import CliRunner

from sif_jax.bench.hacks import SETTINGS, measure, pays, report
from sif_jax.bench.tricks import TRICKS
from sif_jax.cli import main
from sif_jax.config import HacksBenchConfig
from sif_jax.judge.rule import rule_score

pytestmark = pytest.mark.xdist_group("hacks")  # its fixtures are slow: made once, not by each worker

ALL = [(family, trick) for family, members in TRICKS.items() for trick in members]
ROUNDING = 1e-4


@pytest.fixture(scope="module")
def figures():
    return measure(HacksBenchConfig(records=64))


def gain(figures, family: str, trick: str, setting: str) -> float:
    return figures["tricks"][family][trick][setting]["mean"]


@pytest.mark.parametrize(("family", "trick"), ALL)
def test_no_trick_pays_under_the_hardened_rewards(figures, family, trick):
    assert not pays(figures["tricks"][family][trick]["hardened"])


def test_the_papers_progress_pays_for_a_worse_first_look(figures):
    for setting in ("paper", "paper, max", "release", "release, max"):
        assert gain(figures, "progress", "an empty corner first", setting) > 0.3
    assert abs(gain(figures, "progress", "an empty corner first", "hardened")) < 0.05


def test_added_boxes_are_free_in_the_papers_pair_term_and_cost_with_the_larger_denominator(figures):
    for trick in ("two specks added", "every box twice"):
        assert abs(gain(figures, "boxes", trick, "paper")) < 0.01
        assert gain(figures, "boxes", trick, "paper, max") < -0.2


def test_missing_boxes_cost_more_with_the_larger_denominator(figures):
    lost = {setting: gain(figures, "boxes", "only the surest box", setting) for setting in ("paper", "paper, max")}
    assert lost["paper, max"] < lost["paper"] - 0.2 < 0


def test_a_depth_term_of_all_or_nothing_pays_for_fewer_depths(figures):
    assert gain(figures, "depth", "one step only", "paper, max, no box progress") > 0.05
    assert gain(figures, "depth", "one step only", "hardened") < 0.05


@pytest.mark.parametrize("trick", ["text before the trace", "text after the trace", "an empty area added"])
def test_stuffing_outside_the_grammar_costs_the_format_term_in_the_paper_and_nothing_in_the_release(figures, trick):
    assert gain(figures, "format", trick, "paper") == pytest.approx(-1, abs=ROUNDING)
    assert gain(figures, "format", trick, "release") == pytest.approx(0, abs=ROUNDING)


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("family", ["format", "answer"])
def test_no_stuffing_pays_under_any_setting(figures, family, setting):
    assert not any(pays(figures["tricks"][family][trick][setting]) for trick in TRICKS[family])


def test_a_list_of_words_beats_a_guess_under_token_f1():
    words = ["red", "green", "blue", "yellow"]
    guess = sum(rule_score("Which colour?", "red", word) for word in words) / len(words)
    assert rule_score("Which colour?", "red", " ".join(words)) == pytest.approx(0.4)
    assert guess == 0.25


def test_the_table_marks_what_pays(figures):
    lines = report(figures).splitlines()
    corner = next(line for line in lines if "an empty corner first" in line)
    assert corner.count("**+") >= 4
    assert "**" not in next(line for line in lines if "whole image last" in line)


def test_the_command_ends_with_a_line_of_json_that_the_seed_determines():
    result = CliRunner().invoke(main, ["bench", "hacks", "records=16", "--json"])
    assert result.exit_code == 0, result.output
    printed, again = json.loads(result.output.splitlines()[-1]), measure(HacksBenchConfig(records=16))
    assert printed["config"] == {"records": 16, "seed": 0}
    assert printed["tricks"] == again["tricks"]
