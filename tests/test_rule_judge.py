"""The rule judge, by tables: what counts as right, and what only looks like it."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sif_jax.judge.rule import rule_score

LISTED = "Where is the cat? (A) on the left (B) on the right (C) vitamin C"
LINES = "How many?\nA. two\nB. three\nC. 12"
POLAR = "Is it red?\n(A) Yes\n(B) No"

TABLE = [
    # Letters
    ("Which?", "B", "B", 1),
    ("Which?", "B", "b", 1),
    ("Which?", "B", "(B)", 1),
    ("Which?", "B", "B.", 1),
    ("Which?", "B", "B) on the right", 1),
    ("Which?", "B", "The answer is B", 1),
    ("Which?", "B", "The correct answer is option (B).", 1),
    ("Which?", "B", "Answer: B", 1),
    ("Which?", "B", "A", 0),
    ("Which?", "A", "A cat", 0),
    ("Which?", "B", "Blue", 0),
    ("Which?", "T", "The answer is B", 0),
    ("Which?", "A", "", 0),
    ("Which?", "B", "A or B", 0),
    ("Which?", "B", "A B C D", 0),
    ("Which?", "B", "B A", 0),
    # Options that the question lists
    (LISTED, "B", "On the right.", 1),
    (LISTED, "(B) on the right", "B", 1),
    (LISTED, "on the right", "B", 1),
    (LISTED, "on the right", "on the left", 0),
    (LISTED, "on the right", "It is on the right of the dog", 0),
    (LISTED, "C", "vitamin C", 1),
    (LISTED, "A", "A cat on the right", 0),
    (LISTED, "B", "on the left on the right vitamin C", 0),
    (LINES, "B", "3", 1),
    (LINES, "B", "C", 0),
    (LINES, "C", "twelve", 1),
    (POLAR, "A", "Yes, it is.", 1),
    (POLAR, "A", "No", 0),
    (POLAR, "Yes", "(A)", 1),
    # Yes and no
    ("Is it red?", "Yes", "yes.", 1),
    ("Is it red?", "no", "No, it is blue", 1),
    ("Is it red?", "no", "Yes, there is no doubt", 0),
    ("Is it red?", "yes", "The answer is yes", 1),
    ("Is it red?", "no", "Nothing", 0),
    ("Is it red?", "yes", "It might be", 0),
    # Numbers
    ("How many?", "3", "three", 1),
    ("How many?", "three", "There are 3 cups.", 1),
    ("How many?", "3", "3.0", 1),
    ("How many?", "3.5", "35", 0),
    ("How many?", "1,000", "1000", 1),
    ("How many?", "-2", "2", 0),
    ("How many?", "3", "3 or 4", 0),
    ("How many?", "3", "13", 0),
    ("How many?", "3", "many", 0),
    ("How many?", "3", "1 2 3 4 5", 0),
    ("How many?", "3", "3 3", 0),
    # Boxes
    ("Where?", "[0, 0, 1, 1]", "[0, 0, 0.5, 1]", 0.5),
    ("Where?", "[[0, 0, 0.5, 1], [0.5, 0, 1, 1]]", "[0.5, 0, 1, 1], [0, 0, 0.5, 1]", 1),
    ("Where?", "[0, 0, 1, 1]", '[{"bbox_2d": [0, 0, 1, 1], "depth": 0.5}]', 1),
    ("Where?", "[0, 0, 0.5, 1]", "[0, 0, 0.5, 1], [0.9, 0.9, 0.9, 0.9]", 0.75),
    ("Where?", "[[0, 0, 0.5, 1], [0.5, 0, 1, 1]]", "[0, 0, 0.5, 1]", 0.5),
    ("Where?", "[0, 0, 1, 1]", "[0, 0, 1, 1], " * 500 + "[0, 0, 1, 1]", (1 + 1 / 64) / 2),
    ("Where?", "[0, 0, 1, 1]", "on the left", 0),
    ("Where?", "[0, 0, 1, 1]", "[1, 1, 0, 0]", 0),
    ("Where?", "[0, 0, 1, 1]", "[NaN, 0, 1, 1]", 0),
    ("Where?", "[0, 0, 1, 1]", "[" * 9000, 0),
    # Words
    ("What?", "dog", "A dog.", 1),
    ("What?", "the brown dog", "a dog", 2 / 3),
    ("What?", "dog", "It is a dog", 0.5),
    ("What?", "dog", "dogs", 0),
    ("What?", "dog", "cat dog bird", 0.5),
    ("What?", "dog", "", 0),
    ("What?", "None", "None.", 1),
]


@pytest.mark.parametrize(("question", "gold", "answer", "expected"), TABLE)
def test_an_answer_scores_what_the_table_says(question, gold, answer, expected):
    assert rule_score(question, gold, answer) == pytest.approx(expected)


texts = st.text(max_size=30) | st.sampled_from([row[i] for row in TABLE for i in range(3)])


@settings(deadline=None, max_examples=200)
@given(texts, texts, texts)
def test_any_texts_score_between_zero_and_one(question, gold, answer):
    assert 0 <= rule_score(question, gold, answer) <= 1


@pytest.mark.parametrize("gold", ["B", "yes", "twelve", "3.5", "[0.1, 0.2, 0.3, 0.4]", "the brown dog"])
def test_the_gold_answer_itself_is_right(gold):
    assert rule_score("What?", gold, gold) == 1


def test_the_real_gold_answers_are_right(shared_data):
    rows = [
        json.loads(line) for line in (shared_data / "viscot/train/vsr_cot_train.jsonl").read_text().splitlines()[:300]
    ]
    assert all(rule_score(row["question"], row["answer"], row["answer"]) == 1 for row in rows)
    wrong = {"Yes": "No", "No": "Yes"}
    polar = [row for row in rows if row["answer"] in wrong]
    assert polar
    assert all(rule_score(row["question"], row["answer"], wrong[row["answer"]]) == 0 for row in polar)
