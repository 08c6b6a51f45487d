"""Texts made to be slow or deep to parse, and how long each takes: `python -m tests.hostile_texts` prints milliseconds."""

import json
import time

from sif_jax.sif.grammar import parse

ITEM = '{"bbox_2d":[0,0,1,1],"depth":0.5},'
STEP = f"<area>[{ITEM[:-1]}]</area><text>t</text>"
REPEATED = [
    *["<", "</", "<thin", "&lt;", "<think>", "</answer>", "<answer> ", "<text>", "<text>a", STEP],
    *["<area>", "<area>[", "<area>{", "<area>1</area>", "<area></area>", "<area>[]</area><text>t</text>"],
    *["[", "]", '"', "\\", "-", " ", "\n", "\x00", "\u3000", "\ud800", "\U0001f600"],
]
IN_AN_AREA = [
    "[",
    "{",
    '{"a":',
    "[],",
    "{},",
    "1,",
    "1e9,",
    "null,",
    ITEM,
    "[[[[1]]]],",
    '["]",',
    '["\\"]",',
    " ",
    "-",
    "\\",
]


def hostile_texts(size: int) -> dict[str, str]:
    """About `size` characters each, by what they are made of."""

    def filled(piece: str) -> str:
        return piece * (size // len(piece))

    def area(body: str) -> str:
        return f"<think><area>[{body}]</area>"

    return {
        **{piece: filled(piece) for piece in REPEATED},
        **{f"area of {piece}": area(filled(piece)[:-1]) for piece in IN_AN_AREA},
        "digits": area(f'{{"bbox_2d":[0,0,1,1],"depth":{"9" * size}}}'),
        "decimals": area(f'{{"bbox_2d":[0,0,1,1],"depth":0.5{"0" * size}1}}'),
        "a box of many numbers": area(f'{{"depth":0.5,"bbox_2d":[{filled("1,")}1]}}'),
        "many keys": area("{" + ",".join(f'"{i}":1' for i in range(size // 8)) + "}"),
        "escapes": area('"' + filled("\\u0061") + '"'),
        "brackets closed in a string": area('"' + "]" * (size // 2) + '",' + "[" * (size // 2)),
        "a wide gap": "a" + " " * size + "b",
    }


def milliseconds(size: int, repeats: int) -> dict[str, float]:
    """The best of some runs of each text, taken in turns so that a busy moment of the machine meets them all."""
    best = dict.fromkeys(texts := hostile_texts(size), float("inf"))
    for _ in range(repeats):
        for name, text in texts.items():
            began = time.perf_counter()
            parse(text)
            best[name] = min(best[name], 1000 * (time.perf_counter() - began))
    return best


if __name__ == "__main__":
    print(json.dumps({size: milliseconds(size, repeats=15) for size in (8_192, 65_536)}))
