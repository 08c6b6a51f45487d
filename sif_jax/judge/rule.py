"""Judging an answer by rules, where no model can be asked (host).

The gold answer says which rule holds. The first that fits:

- boxes, JSON of one or more [x1, y1, x2, y2]: HIoU with the answer's first 64 boxes, its pairs
  averaged over the larger count, so that added and missing boxes cost.
- a choice, a letter or the words of an option that the question lists: 1 if the answer names that option, by letter
  ("B", "(b)", "B. left", "The answer is B") or by the option's words alone. "A cat" does not name option A.
- yes or no: 1 if the answer's first word is that word.
- a number, in digits or a word up to twelve: 1 if that is the only number in the answer.
- anything else: token F1 as in SQuAD, without case, punctuation and articles. It pays for lists: n words, one of them
  right, score 2/(n + 1) where a guess is right once in n.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

from sif_jax.sif.overlap import hiou

_MAX_CHARS = 10_000
_MAX_BOXES = 64
_MAX_COORDINATE = 1e9

_LEAD_IN = re.compile(
    r"(?:(?:so|thus|therefore),?\s+)?(?:the\s+)?(?:(?:final|correct|right|best)\s+)?(?:answer|option|choice)\b"
    r"(?:\s+is\b)?:?\s*",
    re.IGNORECASE,
)
_LETTER = re.compile(r"(?:\(([A-Za-z])\)|([A-Za-z])(?=[.):]|$))")
_OPTION = re.compile(r"(?:^|\s)\(?([A-Z])[).:]\s+(\S.*?)(?=\s+\(?[A-Z][).:]\s|\n|$)")
_TOKEN = re.compile(r"\d+(?:[.,:]\d+)*|\w+(?:'\w+)*")
_DIGITS = re.compile(r"-?\d+(?:,\d{3})*(?:\.\d+)?")
_ARTICLES = frozenset({"a", "an", "the"})
_NUMBER_WORDS = {
    word: float(value)
    for value, word in enumerate(
        ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
    )
}


def rule_score(question: str, gold_answer: str, answer: str) -> float:
    """How well the answer agrees with the gold answer, in [0, 1]."""
    gold, answer = gold_answer.strip(), _without_lead_in(answer.strip()[:_MAX_CHARS])
    if gold_boxes := _boxes(gold):
        return hiou(_boxes(answer)[:_MAX_BOXES], gold_boxes, pair_denominator="max")

    options = _options(question)
    gold_letter = _named_letter(gold, options) if options else gold if re.fullmatch("[A-Z]", gold) else None
    if gold_letter:
        if letter := _named_letter(answer, options):
            return float(letter == gold_letter)
        gold = options.get(gold_letter, gold)

    gold_tokens, tokens = _tokens(gold), _tokens(answer)
    if gold_tokens in (["yes"], ["no"]):
        return float(tokens[:1] == gold_tokens)
    gold_numbers = _numbers(gold)
    if len(gold_tokens) == 1 and len(gold_numbers) == 1:
        return float(_numbers(answer) == gold_numbers)
    return 0.0 if gold_letter else _token_f1(gold_tokens, tokens)


def _without_lead_in(answer: str) -> str:
    """ "The answer is option B" to "B"."""
    while match := _LEAD_IN.match(answer):
        answer = answer[match.end() :]
    return answer


def _options(question: str) -> dict[str, str]:
    """Letter to words of the options that a question lists from A on; none if it lists fewer than two."""
    found = dict(_OPTION.findall(question))
    is_list = len(found) > 1 and sorted(found) == [chr(ord("A") + i) for i in range(len(found))]
    return found if is_list else {}


def _named_letter(text: str, options: Mapping[str, str]) -> str | None:
    if match := _LETTER.match(text):
        return (match[1] or match[2]).upper()
    tokens = _tokens(text)
    return next((letter for letter, words in options.items() if tokens and _tokens(words) == tokens), None)


def _tokens(text: str) -> list[str]:
    tokens = _TOKEN.findall(text.lower())
    return [token for token in tokens if token not in _ARTICLES]


def _numbers(text: str) -> list[float]:
    digits = [float(number.replace(",", "")) for number in _DIGITS.findall(text)]
    return digits + [_NUMBER_WORDS[token] for token in _tokens(text) if token in _NUMBER_WORDS]


def _token_f1(gold: list[str], tokens: list[str]) -> float:
    common = (Counter(gold) & Counter(tokens)).total()
    return 2 * common / (len(gold) + len(tokens)) if common else 0.0


def _boxes(text: str) -> list[list[float]]:
    """The boxes of JSON text: one, several, a list of them, or objects with bbox_2d; none if it is anything else."""
    if not text.startswith(("[", "{")):
        return []
    try:
        return _collect_boxes(json.loads(f"[{text}]"))
    except (ValueError, RecursionError):
        return []


def _collect_boxes(value: Any) -> list[list[float]]:
    if isinstance(value, dict):
        return _collect_boxes(value["bbox_2d"]) if "bbox_2d" in value else []
    if not isinstance(value, list):
        return []
    if len(value) == 4 and all(type(v) in (int, float) and abs(v) <= _MAX_COORDINATE for v in value):
        return [[float(v) for v in value]]
    return [box for item in value for box in _collect_boxes(item)]
