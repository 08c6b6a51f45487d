"""SIF rows: lossless, checked, written whole or not at all."""

import dataclasses
import errno
import json
import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sif_jax.errors import InputError
from sif_jax.sif import prompts
from sif_jax.sif.record import Record, messages, read_records, record_to_row, write_records

COMPLETION = (
    '<think>\n<area>[{"bbox_2d":[0.000,0.000,1.000,1.000],"depth":0.500}]</area>\n<text>A street.</text>\n</think>\n'
    "<answer>\nNo\n</answer>"
)


def released_row(**changes):
    row = {
        "dataset": "vsr",
        "image": "vsr/1.jpg",
        "depth_image": "vsr/1_d.png",
        "problem": "Is the car over the cat?",
        "normalized_solution_round": {
            "bbox_3d": [[0.054, 0.594, 0.951, 0.961], [0, 0, 1, 0.5]],
            "illegal_content": False,
        },
        "response": "No",
        "messages": [
            {"content": prompts.user_text("Is the car over the cat?"), "role": "user"},
            {"content": COMPLETION, "role": "assistant"},
        ],
        "images": ["vsr/1.jpg", "vsr/1_d.png"],
    }
    return row | changes


def save(path, rows):
    lines = [json.dumps(row) for row in rows]
    path.write_text("\n".join(lines) if path.suffix == ".jsonl" else f"[{','.join(lines)}]")
    return path


def test_a_released_row_becomes_typed_fields(tmp_path):
    file = read_records(save(tmp_path / "sif.json", [released_row()]))
    (record,) = file.records
    assert record.gold_boxes == ((0.054, 0.594, 0.951, 0.961), (0.0, 0.0, 1.0, 0.5))
    assert (record.response, record.completion, record.frame) == ("No", COMPLETION, "normalised")
    assert record.extra == {}
    assert file.image_root == tmp_path
    assert messages(record) == released_row()["messages"]


ODD_ROWS = {
    "unknown keys": released_row(source_id=7, note={"a": [None, "é"]}),
    "another key order": dict(reversed(released_row().items())),
    "no depth image": {k: v for k, v in released_row(images=["vsr/1.jpg"]).items() if k != "depth_image"},
    "a null depth image": released_row(depth_image=None, images=["vsr/1.jpg"]),
    "no messages": {k: v for k, v in released_row().items() if k not in ("messages", "images")},
    "another prompt": released_row(
        messages=[{"role": "user", "content": "Hm?", "id": 3}, {"role": "assistant", "content": "x"}]
    ),
    "flagged content": released_row(normalized_solution_round={"illegal_content": True, "bbox_3d": [], "by": "x"}),
    "pixels": released_row(
        frame="pixel", normalized_solution_round={"bbox_3d": [[3, 4, 500, 20.5]], "illegal_content": False}
    ),
    "a lone surrogate": released_row(response="\ud83d"),
}


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
@pytest.mark.parametrize("name", ODD_ROWS)
def test_reading_and_writing_loses_nothing(tmp_path, name, suffix):
    source = save(tmp_path / f"source{suffix}", [ODD_ROWS[name], released_row()])
    file = read_records(source)
    target = tmp_path / f"target{suffix}"
    write_records(target, file.records)
    assert read_records(target).records == file.records
    text = target.read_text()
    rows = json.loads(text) if suffix == ".json" else [json.loads(line) for line in text.splitlines()]
    assert rows == [ODD_ROWS[name], released_row()]
    assert list(rows[0]) == list(ODD_ROWS[name])


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)


@settings(deadline=None, max_examples=60)
@given(extra=st.dictionaries(st.text().filter(lambda key: key not in released_row() and key != "frame"), json_values))
def test_any_unknown_key_survives(tmp_path_factory, extra):
    path = tmp_path_factory.mktemp("rows") / "sif.jsonl"
    row = released_row() | extra
    write_records(path, read_records(save(path, [row])).records)
    assert [json.loads(line) for line in path.read_text().split("\n") if line] == [row]


def test_a_new_completion_and_depth_image_reach_the_row(tmp_path):
    (record,) = read_records(save(tmp_path / "sif.json", [ODD_ROWS["no messages"] | {"depth_image": None}])).records
    row = record_to_row(dataclasses.replace(record, completion="<think>", depth_image="d.png"))
    assert row["messages"][-1] == {"content": "<think>", "role": "assistant"}
    assert row["depth_image"] == "d.png"


def test_a_record_made_in_code_writes_the_released_keys():
    record = Record(
        dataset="d", image="i.png", depth_image="d.png", problem="Q?", gold_boxes=((0.0, 0.0, 0.5, 0.5),), response="A"
    )
    row = record_to_row(record)
    assert list(row) == list(released_row())
    assert row["normalized_solution_round"] == {"bbox_3d": [[0.0, 0.0, 0.5, 0.5]], "illegal_content": False}
    assert row["images"] == ["i.png", "d.png"]


def boxes(*values):
    return {"normalized_solution_round": {"bbox_3d": list(values), "illegal_content": False}}


REFUSED = {
    "a box outside the image": (
        boxes([0.1, 0.1, 1.2, 0.5]),
        r"outside the image; got \[0.1, 0.1, 1.2, 0.5\].*\[0, 1\].*fix",
    ),
    "pixels without a frame": (boxes([3, 4, 50, 60]), "outside the image.*frame"),
    "a negative coordinate": (boxes([-0.1, 0.1, 0.2, 0.5]), "outside the image"),
    "an inverted box": (boxes([0.5, 0.1, 0.2, 0.5]), "inverted or empty.*x1 < x2.*fix: give corners"),
    "an empty box": (boxes([0.5, 0.1, 0.5, 0.5]), "inverted or empty"),
    "three numbers": (boxes([0.5, 0.1, 0.5]), "four numbers"),
    "a boolean coordinate": (boxes([0, 0, True, 1]), "four numbers"),
    "a huge integer": (boxes([0, 0, 10**400, 1]), "outside the image"),
    "a string for the boxes": (
        {"normalized_solution_round": {"bbox_3d": "none"}},
        "'bbox_3d' has the wrong type.*a list",
    ),
    "no boxes at all": ({"normalized_solution_round": {}}, "'bbox_3d' is missing"),
    "a number for the answer": ({"response": 3}, "'response' has the wrong type; got 3; expected a string"),
    "messages of the wrong kind": ({"messages": [{"role": "user"}]}, "message is malformed"),
    "an unknown frame": ({"frame": "square"}, "unknown frame; got 'square'; expected one of normalised, pixel"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_malformed_row_is_refused_in_one_line_that_names_it(tmp_path, name):
    change, message = REFUSED[name]
    path = save(tmp_path / "sif.json", [released_row(), released_row(**change)])
    with pytest.raises(InputError, match=message) as error:
        read_records(path)
    assert str(error.value).startswith(f"{path}: row 2: ")


@pytest.mark.parametrize("key", ["dataset", "image", "problem", "normalized_solution_round", "response"])
def test_a_missing_key_is_refused_by_name(tmp_path, key):
    row = {k: v for k, v in released_row().items() if k != key}
    with pytest.raises(InputError, match=f"row 1: the key '{key}' is missing"):
        read_records(save(tmp_path / "sif.jsonl", [row]))


def test_malformed_json_is_refused_with_its_line_and_column(tmp_path):
    path = tmp_path / "sif.json"
    path.write_text('[\n  {"dataset": }\n]')
    with pytest.raises(InputError, match="malformed JSON at line 2 column 15"):
        read_records(path)


@pytest.mark.parametrize("text", ["[NaN]", "[" * 100_000, "{}", "", "[1]"])
def test_a_file_that_is_no_list_of_rows_is_refused(tmp_path, text):
    path = tmp_path / "sif.json"
    path.write_text(text)
    with pytest.raises(InputError, match=r"sif\.json"):
        read_records(path)


def test_a_file_that_is_missing_or_not_text_is_refused(tmp_path):
    (tmp_path / "image.json").write_bytes(b"\x89PNG\xff\xfe")
    for name in ("missing.json", "image.json", "."):
        with pytest.raises(InputError, match="fix"):
            read_records(tmp_path / name)


def test_bad_rows_can_be_skipped_and_are_listed(tmp_path):
    path = tmp_path / "sif.jsonl"
    good = json.dumps(released_row())
    path.write_text(f"{good}\n\n{{oops\n{json.dumps(released_row(response=1))}\n{good}\n")
    file = read_records(path, on_error="skip")
    assert len(file.records) == 2
    assert [row for row, _ in file.skipped] == [3, 4]
    assert "malformed JSON at line 3 column 2" in file.skipped[0][1]


def test_a_full_disk_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    path = save(tmp_path / "sif.json", [released_row()])
    before = path.read_bytes()
    records = read_records(path).records

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match=r"sif\.json: cannot write the file \(No space left on device\); fix"):
        write_records(path, records * 2)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["sif.json"]


def test_writing_into_a_missing_folder_is_refused(tmp_path):
    with pytest.raises(InputError, match="cannot write"):
        write_records(tmp_path / "no" / "sif.json", [])
