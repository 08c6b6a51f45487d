"""The grammar under attack: mutated completions never raise, and hostile ones cost milliseconds."""

import json
import math
import random
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from sif_jax.sif.grammar import MAX_TAGS, BoxDepth, Problem, Step, Trace, parse, render
from tests.hostile_texts import hostile_texts

TAGS = [f"<{slash}{name}>" for name in ("think", "area", "text", "answer") for slash in ("", "/")]
FRAGMENTS = [
    *TAGS,
    *["<", ">", "[", "]", "{", "}", ",", ":", '"', "\\", "-", ".", "e9", "0", "7", "0.1234", "1.5", "-0", "1e999"],
    *["NaN", "Infinity", "true", "null", '""', '"depth":', '"bbox_2d":', '{"a":1}', "[]", "{}", "[[[[[", "]]]]]"],
    *[
        " ",
        "\n",
        "\t",
        "\x00",
        "\x0b",
        "\x1f",
        "\x7f",
        "\u200b",
        "\u2028",
        "\u3000",
        "\ufeff",
        "\ud800",
        "\udfff",
        "é",
        "１",
    ],
]
MAX_LENGTH = 20_000  # mutations that repeat would otherwise compound
NUMBER, OBJECT, AREA = r"[\d.]+", r"\{[^{}]*\}", "(?<=<area>)[^<]*"
VALUES = ["true", "null", '"0.5"', "1.5", "-0.1", "-0", "1e999", "5e-1", "0.1234", "NaN", "[]", "{}", "[7]", "[{}]"]
DEPTH_PROBLEMS = {Problem.DEPTH_IS_BOOLEAN, Problem.DEPTH_NOT_NUMBER, Problem.MISSING_KEY}


def valid_completion(rng: random.Random) -> str:
    def interval() -> tuple[float, float]:
        low, high = sorted(rng.sample(range(1001), 2))
        return low / 1000, high / 1000

    def box_depth() -> BoxDepth:
        (x1, x2), (y1, y2) = interval(), interval()
        return BoxDepth((x1, y1, x2, y2), rng.randrange(1001) / 1000)

    def words() -> str:
        return " ".join(rng.choices(["the", "cup", "left", "of", "A", "3", "near", "0.5", "é"], k=rng.randint(1, 6)))

    steps = [Step(tuple(box_depth() for _ in range(rng.randint(1, 3))), words()) for _ in range(rng.randint(1, 4))]
    return render(steps, words())


def mutated(text: str, rng: random.Random) -> str:
    """One edit: a span deleted, doubled, repeated, moved or reversed, a fragment put in, or a value put over a value."""
    start, end = sorted(rng.choices(range(len(text) + 1), k=2))
    end = min(end, start + rng.choice([1, 4, 20, 200]))
    span = text[start:end]
    match rng.randrange(9):
        case 0:
            return text[:start] + text[end:]
        case 1:
            return text[:end] + span + text[end:]
        case 2:
            return text[:end] + span * rng.choice([2, 2, 2, 2000 // max(len(span), 6)]) + text[end:]
        case 3:
            rest = text[:start] + text[end:]
            at = rng.randrange(len(rest) + 1)
            return rest[:at] + span + rest[at:]
        case 4:
            return text[:start] + span[::-1] + text[end:]
        case 5:
            return text[:start] + rng.choice(FRAGMENTS) + text[end:]
        case 6:
            return text.replace(rng.choice(TAGS), rng.choice([*TAGS, "", "</text><area>" * MAX_TAGS]), 1)
        case 7 if parts := list(re.finditer(rng.choice([NUMBER, NUMBER, OBJECT, AREA]), text)):
            part = rng.choice(parts)
            return text[: part.start()] + rng.choice(VALUES) + text[part.end() :]
        case _:
            return text[:start] + rng.choice(FRAGMENTS) + text[start:]


def is_complete(trace: Trace) -> bool:
    """Whether rendering can say all that a well-formed trace says."""
    return bool(trace.answer and trace.steps) and all(
        step.boxes and step.text and all(0 <= item.depth <= 1 for item in step.boxes) for step in trace.steps
    )


def check_invariants(text: str, trace: Trace) -> None:
    found = {violation.problem for violation in trace.violations}
    assert all(0 <= violation.position <= len(text) for violation in trace.violations)
    assert len(trace.steps) <= MAX_TAGS
    for item in (item for step in trace.steps for item in step.boxes):
        x1, y1, x2, y2 = item.box_norm
        assert 0 <= x1 < x2 <= 1
        assert 0 <= y1 < y2 <= 1
        assert math.isfinite(item.depth) or (math.isnan(item.depth) and found & DEPTH_PROBLEMS)
    if not is_complete(trace):
        assert not trace.well_formed
        return
    canonical = render(trace.steps, trace.answer or "")
    if trace.well_formed:
        assert parse(canonical) == trace
        assert render(parse(canonical).steps, trace.answer or "") == canonical
    else:
        assert canonical != text


def fuzz(seed: int, count: int) -> None:
    rng, seen = random.Random(seed), Counter()
    valid = [valid_completion(rng) for _ in range(500)]
    for _ in range(count):
        text = rng.choice(valid)
        for _ in range(rng.choice([0, 1, 1, 1, 2, 3, 8])):
            text = mutated(text, rng)[:MAX_LENGTH]
        trace = parse(text)
        check_invariants(text, trace)
        seen.update({violation.problem for violation in trace.violations} or {"well formed"})
    rare = [problem for problem in ("well formed", *Problem) if seen[problem] < count // 2000]
    assert not rare, f"mutations reach every kind of violation: {seen}"


def run_apart(*arguments: str) -> str:
    """What a fresh Python prints, without the runtime type checks, which take most of the time here."""
    run = subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, cwd=Path(__file__).parents[1], check=False
    )
    assert run.returncode == 0, run.stderr
    return run.stdout


@pytest.mark.parametrize(("seed", "count"), [(0, 10_000), pytest.param(1, 100_000, marks=pytest.mark.slow)])
def test_mutated_completions_never_raise_and_read_to_what_they_say(seed, count):
    run_apart("-c", f"from tests.test_grammar_fuzz import fuzz; fuzz({seed}, {count})")


def test_some_mutated_completions_with_runtime_type_checks():
    fuzz(seed=2, count=1_000)


def test_hostile_texts_do_not_raise():
    for text in hostile_texts(8_192).values():
        check_invariants(text, parse(text))


def test_the_worst_of_the_hostile_texts_is_parsed_within_milliseconds(measured):
    times = json.loads(run_apart("-m", "tests.hostile_texts"))
    small, large = times["8192"], times["65536"]
    measured("parsing the worst of the hostile texts of 8 KB, milliseconds", max(small.values()), at_most=5)
    # 64 KB are eight times 8 KB; three times more is allowed for a busy machine.
    slowest = max(large[name] / max(small[name], 0.2) for name in small)
    measured("parsing 64 KB, times 8 KB", slowest, at_most=24)
