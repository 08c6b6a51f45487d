"""SIF-50K rows: one typed record, read and written losslessly (host).

A row without gold boxes is legal here, as a dialogue or a "None" answer has none; the rewards refuse it.
Rows are counted from 1; in a .jsonl file the number is that of the line.
"""

from __future__ import annotations

import dataclasses
import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn, get_args

from sif_jax.errors import InputError
from sif_jax.sif import prompts
from sif_jax.sif.boxes import Box

Frame = Literal["normalised", "pixel", "padded_square"]

_SOLUTION = "normalized_solution_round"
_RELEASED_KEYS = ("dataset", "image", "depth_image", "problem", _SOLUTION, "response", "messages", "images")
_TURN_KEYS = ("content", "role")
_MAX_COORDINATE = 1e9


@dataclasses.dataclass(frozen=True, kw_only=True)
class Record:
    """One question about one image, its gold boxes (xyxy, in `frame`), gold answer and chain of thought.

    `extra` holds what the typed fields do not say: unknown keys, and known keys whose value is not the one the fields
    give. `keys` is the order of the keys on disk.
    """

    dataset: str
    image: str
    depth_image: str | None
    problem: str
    gold_boxes: tuple[Box, ...]
    response: str
    completion: str | None = None
    frame: Frame = "normalised"
    depth_polarity: Literal["near0"] = "near0"
    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    keys: tuple[str, ...] = _RELEASED_KEYS


@dataclasses.dataclass(frozen=True)
class RecordFile:
    """The records of a file and their rows, the (row, message) of each skipped row, and the folder of the image paths."""

    records: tuple[Record, ...]
    rows: tuple[int, ...]
    skipped: tuple[tuple[int, str], ...]
    image_root: Path


def read_records(
    path: str | Path, *, image_root: str | Path | None = None, on_error: Literal["raise", "skip"] = "raise"
) -> RecordFile:
    """Reads a .json list or a .jsonl file of SIF rows.

    Raises:
      InputError: the file is missing or not JSON, or (unless `on_error="skip"`) a row is malformed.
    """
    path = Path(path)
    records, rows, skipped = [], [], []
    for number, source in _sources(path):
        try:
            row = _loads(source, path, number) if path.suffix == ".jsonl" else source
            records.append(_parse_row(row, {"file": path, "row": number}))
            rows.append(number)
        except InputError as error:
            if on_error == "raise":
                raise
            skipped.append((number, str(error)))
    root = path.parent if image_root is None else Path(image_root)
    return RecordFile(tuple(records), tuple(rows), tuple(skipped), root)


def write_records(path: str | Path, records: Iterable[Record]) -> None:
    """Writes a .json list or .jsonl lines, whole or not at all.

    Raises:
      InputError: the file cannot be written, as on a full disk; what stood there before is untouched.
    """
    path = Path(path)
    rows = [record_to_row(record) for record in records]
    if path.suffix == ".jsonl":
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    else:
        text = json.dumps(rows, ensure_ascii=False, indent=4) + "\n"
    # A lone surrogate has no UTF-8 form; its backslash escape is also its JSON escape.
    _write_atomically(path, text.encode("utf-8", "backslashreplace"))


def messages(record: Record, depth_input: bool = True, with_depth_words: bool = True) -> list[dict[str, str]]:
    """The chat of a record: the user turn and, if there is a completion, the assistant turn."""
    question = prompts.user_text(record.problem, depth_input, with_depth_words)
    return [{"content": question, "role": "user"}, *_assistant_turn(record.completion)]


def record_to_row(record: Record) -> dict[str, Any]:
    """The row on disk, its keys in the order of the source."""
    row = _canonical_row(record) | dict(record.extra)
    row[_SOLUTION] = row[_SOLUTION] | {"bbox_3d": [list(box) for box in record.gold_boxes]}
    if record.depth_image is not None:
        row["depth_image"] = record.depth_image
    if record.completion is not None:
        row["messages"] = _with_completion(row["messages"], record.completion)
    said = {
        "depth_image": record.depth_image is not None,
        "messages": record.completion is not None,
        "frame": record.frame != "normalised",
    }
    needed = [*record.keys, *record.extra, *(key for key, is_said in said.items() if is_said)]
    return {key: row[key] for key in dict.fromkeys(needed)}


def _canonical_row(record: Record) -> dict[str, Any]:
    return {
        "dataset": record.dataset,
        "image": record.image,
        "depth_image": record.depth_image,
        "problem": record.problem,
        _SOLUTION: {"bbox_3d": [list(box) for box in record.gold_boxes], "illegal_content": False},
        "response": record.response,
        "messages": messages(record, depth_input=record.depth_image is not None),
        "images": [image for image in (record.image, record.depth_image) if image is not None],
        "frame": record.frame,
    }


def _assistant_turn(completion: str | None) -> list[dict[str, str]]:
    return [] if completion is None else [{"content": completion, "role": "assistant"}]


def _with_completion(turns: Sequence[Mapping[str, Any]], completion: str) -> list[Mapping[str, Any]]:
    last = _last_assistant(turns)
    if last is None:
        return [*turns, *_assistant_turn(completion)]
    return [*turns[:last], dict(turns[last]) | {"content": completion}, *turns[last + 1 :]]


def _last_assistant(turns: Sequence[Mapping[str, Any]]) -> int | None:
    return max((i for i, turn in enumerate(turns) if turn["role"] == "assistant"), default=None)


def _parse_row(row: Any, where: dict[str, Any]) -> Record:
    if not isinstance(row, dict):
        raise InputError("a row is not an object", **where, value=row, expected="a JSON object with the SIF keys")
    frame = row.get("frame", "normalised")
    if frame not in get_args(Frame):
        raise InputError("unknown frame", **where, value=frame, expected=f"one of {', '.join(get_args(Frame))}")
    has_depth = "depth_image" in row and row["depth_image"] is not None
    boxes = _field(_field(row, _SOLUTION, dict, where), "bbox_3d", list, where)
    record = Record(
        dataset=_field(row, "dataset", str, where),
        image=_field(row, "image", str, where),
        depth_image=_field(row, "depth_image", str, where) if has_depth else None,
        problem=_field(row, "problem", str, where),
        gold_boxes=tuple(_parse_box(box, frame, where) for box in boxes),
        response=_field(row, "response", str, where),
        completion=_parse_completion(_field(row, "messages", list, where), where) if "messages" in row else None,
        frame=frame,
        keys=tuple(row),
    )
    canonical = _canonical_row(record)
    extra = {key: value for key, value in row.items() if key not in canonical or canonical[key] != value}
    return dataclasses.replace(record, extra=extra)


_KINDS = {str: "a string", list: "a list", dict: "an object"}


def _field(row: dict[str, Any], key: str, kind: type, where: dict[str, Any]) -> Any:
    if key not in row:
        raise InputError(f"the key {key!r} is missing", **where, value=sorted(row), fix=f"add {key!r} to the row")
    if not isinstance(row[key], kind):
        raise InputError(f"{key!r} has the wrong type", **where, value=row[key], expected=_KINDS[kind])
    return row[key]


def _parse_completion(turns: list[Any], where: dict[str, Any]) -> str | None:
    for turn in turns:
        if not (isinstance(turn, dict) and all(key in turn and isinstance(turn[key], str) for key in _TURN_KEYS)):
            raise InputError("a message is malformed", **where, value=turn, expected="strings content and role")
    last = _last_assistant(turns)
    return None if last is None else turns[last]["content"]


def _parse_box(box: Any, frame: Frame, where: dict[str, Any]) -> Box:
    # `type`, not isinstance: true is an int to Python, but not a coordinate.
    if not (isinstance(box, list) and len(box) == 4 and all(type(v) in (int, float) for v in box)):
        raise InputError("a gold box is malformed", **where, value=box, expected="[x1, y1, x2, y2], four numbers")
    limit = _MAX_COORDINATE if frame == "pixel" else 1
    if not all(0 <= v <= limit for v in box):
        raise InputError(
            "a gold box is outside the image",
            **where,
            value=box,
            expected="pixels from 0" if frame == "pixel" else "coordinates in [0, 1]",
            fix='divide pixels by the image size, or say "frame": "pixel" in the row',
        )
    x1, y1, x2, y2 = (float(v) for v in box)
    if x2 <= x1 or y2 <= y1:
        raise InputError(
            "a gold box is inverted or empty",
            **where,
            value=box,
            expected="x1 < x2 and y1 < y2",
            fix="give corners as x1, y1, x2, y2, not x, y, width, height",
        )
    return x1, y1, x2, y2


def _sources(path: Path) -> Iterator[tuple[int, Any]]:
    """The rows of a .json list, or the lines of a .jsonl file that are not blank, with their numbers."""
    try:
        text = path.read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"the file is not UTF-8 text ({error})", file=path, fix="save it as UTF-8 JSON") from error
    except OSError as error:
        raise InputError(f"cannot read the file ({error.strerror})", file=path, fix="check the path") from error
    if path.suffix == ".jsonl":
        # split, not splitlines: JSON strings may hold U+2028.
        return ((number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip())
    rows = _loads(text, path, None)
    if not isinstance(rows, list):
        raise InputError("the file is not a list of rows", file=path, value=rows, expected="a JSON list, or .jsonl")
    return iter(enumerate(rows, 1))


def _loads(text: str, path: Path, number: int | None) -> Any:
    where = {"file": path, "row": number, "fix": "write the file with a JSON library"}
    try:
        return json.loads(text, parse_constant=_refuse_constant)
    except json.JSONDecodeError as error:
        place = f"line {error.lineno if number is None else number} column {error.colno}"
        raise InputError(f"malformed JSON at {place} ({error.msg})", **where) from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"malformed JSON ({error})", **where) from error


def _refuse_constant(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not a JSON number")


def _write_atomically(path: Path, data: bytes) -> None:
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
            temporary = Path(file.name)
            try:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
                os.replace(temporary, path)
            finally:
                temporary.unlink(missing_ok=True)
    except OSError as error:
        fix = "check that the folder exists, may be written and has space"
        raise InputError(f"cannot write the file ({error.strerror})", file=path, fix=fix) from error
