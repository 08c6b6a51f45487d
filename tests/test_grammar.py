"""The grammar: strict, total on strings, linear in time, and recovering what can be read."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sif_jax.sif.grammar import MAX_AREA_CHARS, MAX_CHARS, MAX_TAGS, BoxDepth, Problem, Step, Violation, parse, render

WHOLE = '[{"bbox_2d":[0.000,0.000,1.000,1.000],"depth":0.512}]'
CUP = '[{"bbox_2d":[0.100,0.200,0.300,0.400],"depth":0.250}]'
GOOD = (
    f"<think><area>{WHOLE}</area><text>A table.</text><area>{CUP}</area><text>A cup.</text></think><answer>red</answer>"
)


def item(box="[0,0,1,1]", depth="0.5"):
    return f'{{"bbox_2d":{box},"depth":{depth}}}'


def trace_of(area=WHOLE, text="t", answer="a"):
    return f"<think><area>{area}</area><text>{text}</text></think><answer>{answer}</answer>"


def problems(text):
    return [violation.problem for violation in parse(text).violations]


def test_a_trace_is_read_into_steps_and_answer():
    trace = parse(GOOD)
    assert trace.well_formed
    assert trace.steps == (
        Step((BoxDepth((0.0, 0.0, 1.0, 1.0), 0.512),), "A table."),
        Step((BoxDepth((0.1, 0.2, 0.3, 0.4), 0.25),), "A cup."),
    )
    assert trace.answer == "red"
    assert trace.areas == (trace.steps[0].boxes, trace.steps[1].boxes)
    assert trace.texts == ("A table.", "A cup.")


def test_rendering_is_canonical():
    assert render(parse(GOOD).steps, "red") == GOOD


def test_whitespace_between_tags_and_in_json_is_allowed():
    spaced = '\n<think>\n <area>\n[ {"depth": 1, "bbox_2d": [0, 0.5, 1, 1]} ]\n</area>\n<text> t </text>\n</think>\n'
    trace = parse(spaced + "<answer>\nyes\n</answer>\n")
    assert trace.well_formed
    assert (trace.answer, trace.texts) == ("yes", ("t",))


def test_an_area_may_hold_several_boxes_and_a_text_may_hold_other_angle_brackets():
    trace = parse(trace_of(f"[{item()},{item('[0.1,0.1,0.2,0.2]')}]", text="a < b <b> and </p>"))
    assert trace.well_formed
    assert len(trace.areas[0]) == 2


VIOLATIONS = {
    "nothing": ("", [Problem.MISSING_TAG]),
    "text before": ("Sure! " + GOOD, [Problem.OUTSIDE_TEXT]),
    "text between": (GOOD.replace("</text></think>", "</text>so</think>"), [Problem.OUTSIDE_TEXT]),
    "text after": (GOOD + ".", [Problem.OUTSIDE_TEXT]),
    "no think": (GOOD.replace("<think>", ""), [Problem.UNEXPECTED_TAG]),
    "no answer": (GOOD[: GOOD.index("<answer>")], [Problem.MISSING_TAG]),
    "an answer cut off": (GOOD[: GOOD.index("</answer>")], [Problem.UNCLOSED_TAG]),
    "no step": ("<think></think><answer>a</answer>", [Problem.UNEXPECTED_TAG]),
    "an area without text": (GOOD.replace("<text>A cup.</text>", ""), [Problem.UNEXPECTED_TAG]),
    "a nested tag": (
        trace_of(text="<area>"),
        [Problem.NESTED_TAG, Problem.EMPTY_TEXT, Problem.UNCLOSED_TAG, Problem.AREA_NOT_JSON],
    ),
    "two answers": (GOOD + "<answer>b</answer>", [Problem.UNEXPECTED_TAG]),
    "upper case tags": (trace_of().replace("answer", "ANSWER"), [Problem.MISSING_TAG, Problem.OUTSIDE_TEXT]),
    "an empty text": (trace_of(text=" \n"), [Problem.EMPTY_TEXT]),
    "an empty answer": (trace_of(answer=""), [Problem.EMPTY_ANSWER]),
    "an empty area": (trace_of("[]"), [Problem.EMPTY_AREA]),
    "no JSON": (trace_of("[0,0,1"), [Problem.AREA_NOT_JSON]),
    "single quotes": (trace_of(WHOLE.replace('"', "'")), [Problem.AREA_NOT_JSON]),
    "an object": (trace_of(item()), [Problem.AREA_NOT_LIST]),
    "bare boxes": (trace_of("[[0,0,1,1]]"), [Problem.ITEM_NOT_OBJECT]),
    "no depth": (trace_of('[{"bbox_2d":[0,0,1,1]}]'), [Problem.MISSING_KEY]),
    "no box": (trace_of('[{"depth":0.5}]'), [Problem.MISSING_KEY]),
    "a label": (trace_of('[{"bbox_2d":[0,0,1,1],"depth":0.5,"label":"cup"}]'), [Problem.EXTRA_KEY]),
    "a repeated key": (trace_of('[{"bbox_2d":[0,0,1,1],"depth":0.5,"depth":0.6}]'), [Problem.EXTRA_KEY]),
    "another key": (trace_of('[{"bbox":[0,0,1,1],"depth":0.5}]'), [Problem.MISSING_KEY, Problem.EXTRA_KEY]),
    "three numbers": (trace_of(f"[{item('[0,0,1]')}]"), [Problem.BOX_NOT_FOUR_NUMBERS]),
    "a null coordinate": (trace_of(f"[{item('[0,0,1,null]')}]"), [Problem.BOX_NOT_FOUR_NUMBERS]),
    "a boolean coordinate": (trace_of(f"[{item('[0,0,1,true]')}]"), [Problem.BOX_NOT_FOUR_NUMBERS]),
    "a NaN coordinate": (trace_of(f"[{item('[NaN,0,1,1]')}]"), [Problem.BOX_NOT_FOUR_NUMBERS]),
    "an infinite coordinate": (trace_of(f"[{item('[0,0,1,1e999]')}]"), [Problem.BOX_NOT_FOUR_NUMBERS]),
    "pixels": (trace_of(f"[{item('[0,0,640,480]')}]"), [Problem.BOX_OUTSIDE]),
    "a negative coordinate": (trace_of(f"[{item('[-0.1,0,1,1]')}]"), [Problem.BOX_OUTSIDE]),
    "an inverted box": (trace_of(f"[{item('[0.5,0,0.2,1]')}]"), [Problem.BOX_INVERTED]),
    "a flat box": (trace_of(f"[{item('[0,0.5,1,0.5]')}]"), [Problem.BOX_INVERTED]),
    "four decimals": (trace_of(f"[{item('[0,0,0.1234,1]')}]"), [Problem.TOO_MANY_DECIMALS]),
    "an exponent": (trace_of(f"[{item(depth='5e-1')}]"), [Problem.TOO_MANY_DECIMALS]),
    "a depth of four decimals": (trace_of(f"[{item(depth='0.5000')}]"), [Problem.TOO_MANY_DECIMALS]),
    "depth true": (trace_of(f"[{item(depth='true')}]"), [Problem.DEPTH_IS_BOOLEAN]),
    "depth null": (trace_of(f"[{item(depth='null')}]"), [Problem.DEPTH_NOT_NUMBER]),
    "a string depth": (trace_of("[" + item(depth='"0.5"') + "]"), [Problem.DEPTH_NOT_NUMBER]),
    "depth NaN": (trace_of(f"[{item(depth='NaN')}]"), [Problem.DEPTH_NOT_NUMBER]),
    "a depth outside": (trace_of(f"[{item(depth='1.5')}]"), [Problem.DEPTH_OUTSIDE]),
    "a long integer": (trace_of(f"[{item(depth='9' * 5000)}]"), [Problem.DEPTH_NOT_NUMBER]),
    "deep nesting": (trace_of("[" * 9000), [Problem.AREA_NOT_JSON]),
    "deep nesting behind a string": (trace_of('["' + "]" * 9000 + '",' + "[" * 9000), [Problem.AREA_NOT_JSON]),
    "deep nesting between strings": (trace_of('["]",' * 4000), [Problem.AREA_NOT_JSON]),
    "deep nesting behind an escape": (trace_of('["\\"]",' * 2500), [Problem.AREA_NOT_JSON]),
    "one problem twice": (trace_of(f"[{item('[0,0,9,9]')},{item('[0,0,9,8]')}]"), [Problem.BOX_OUTSIDE]),
    "too many tags": (
        f"<think>{f'<area>{WHOLE}</area><text>t</text>' * (MAX_TAGS // 4)}</think><answer>a</answer>",
        [Problem.TOO_LONG, Problem.UNCLOSED_TAG],
    ),
    "a long area": (trace_of("[" + " " * MAX_AREA_CHARS + "]"), [Problem.TOO_LONG]),
    "a long trace": (trace_of() + " " * MAX_CHARS, [Problem.TOO_LONG]),
}


@pytest.mark.parametrize("name", VIOLATIONS)
def test_a_violation_is_named(name):
    text, expected = VIOLATIONS[name]
    assert problems(text) == expected


def test_every_problem_has_a_case():
    assert {problem for _, expected in VIOLATIONS.values() for problem in expected} == set(Problem)


def test_brackets_in_strings_are_not_nesting():
    label = '[{"bbox_2d":[0,0,1,1],"depth":0.5,"label":"[[[[[[[["}]'
    assert problems(trace_of(label)) == [Problem.EXTRA_KEY]
    assert len(parse(trace_of(label)).areas[0]) == 1


def test_as_many_tags_as_are_read_make_a_well_formed_trace():
    steps = f"<area>{WHOLE}</area><text>t</text>" * (MAX_TAGS // 4 - 1)
    assert parse(f"<think>{steps}</think><answer>a</answer>").well_formed


def test_a_violation_says_where():
    assert parse(GOOD + " bye").violations == (Violation(Problem.OUTSIDE_TEXT, len(GOOD) + 1),)
    assert parse(trace_of("[]")).violations == (Violation(Problem.EMPTY_AREA, len("<think><area>")),)


def test_what_can_be_read_is_read_despite_violations():
    mixed = f"[{item('[0,0,9,9]')},{item('[0.1,0.1,0.2,0.2]')},{item('[0,0,0.5,0.5]', 'null')}]"
    trace = parse(f"Well: <area>{mixed}</area> hm <text>a</text><area>[</area><answer>blue")
    assert [box.box_norm for box in trace.areas[0]] == [(0.1, 0.1, 0.2, 0.2), (0.0, 0.0, 0.5, 0.5)]
    assert math.isnan(trace.areas[0][1].depth)
    assert (len(trace.areas), len(trace.steps)) == (1, 2)
    assert (trace.texts, trace.answer, trace.well_formed) == (("a",), "blue", False)


def test_the_first_answer_counts():
    assert parse(GOOD + "<answer>blue</answer>").answer == "red"


TAGS = [f"<{slash}{name}>" for name in ("think", "area", "text", "answer") for slash in ("", "/")]
ODDITIES = ["<", "[", "]", "{", WHOLE, CUP, item(), " ", "\n", "NaN", '"', "\ud800", "\x00", "1e999", "-", "0."]
pieces = st.sampled_from([*TAGS, *ODDITIES]) | st.text(max_size=5)


@settings(deadline=None, max_examples=300)
@given(st.lists(pieces, max_size=30).map("".join))
def test_no_string_raises_and_every_box_read_lies_in_the_image(text):
    trace = parse(text)
    for box in (item.box_norm for area in trace.areas for item in area):
        assert 0 <= box[0] < box[2] <= 1
        assert 0 <= box[1] < box[3] <= 1
    if trace.well_formed:
        assert parse(render(trace.steps, trace.answer or "")) == trace


unit = st.integers(0, 1000).map(lambda thousandths: thousandths / 1000)
interval = st.lists(st.integers(0, 1000), min_size=2, max_size=2, unique=True).map(
    lambda v: [n / 1000 for n in sorted(v)]
)
words = st.text(st.characters(exclude_characters="<"), max_size=9).map(lambda text: f"a{text}b")
an_area = st.lists(st.tuples(interval, interval, unit), min_size=1, max_size=4)


@settings(deadline=None, max_examples=100)
@given(st.lists(st.tuples(an_area, words), min_size=1), words)
def test_what_is_rendered_is_well_formed_and_reads_back(drawn, answer):
    steps = tuple(
        Step(tuple(BoxDepth((x1, y1, x2, y2), depth) for (x1, x2), (y1, y2), depth in area), text)
        for area, text in drawn
    )
    trace = parse(render(steps, answer))
    assert trace.well_formed
    assert (trace.steps, trace.answer) == (steps, answer)


def test_a_box_thinner_than_a_thousandth_renders_as_a_legal_box():
    thin = [Step((BoxDepth((0.5001, 0.9998, 0.5002, 0.9999), 0.1),), "t")]
    trace = parse(render(thin, "a"))
    assert trace.well_formed
    assert trace.areas[0][0].box_norm == (0.5, 0.999, 0.501, 1.0)
