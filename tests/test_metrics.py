"""Metrics: valid JSON for any value, and no step twice after a resume."""

import errno
import html
import io
import json
import math
import os
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tensorboardX.proto.event_pb2 import Event

from sif_jax.errors import InputError
from sif_jax.training.metrics import MetricsLog, read_metrics


def refuse_constants(name: str):
    raise AssertionError(f"{name} is not JSON")


def test_each_step_is_one_line_of_json(tmp_path):
    log = MetricsLog(tmp_path, tensorboard=False)
    log.log(0, {"loss": 0.5, "reward": np.float32(0.25)})
    assert read_metrics(tmp_path)[0]["loss"] == 0.5, "a line is on disk before the log is closed"
    log.log(1, {"loss": 0.25, "reward": 1})
    log.close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["loss"], line["reward"]) for line in lines] == [(0, 0.5, 0.25), (1, 0.25, 1.0)]
    assert all(line["time"] > 1.6e9 for line in lines)


@given(st.dictionaries(st.text(), st.floats(allow_nan=True, allow_infinity=True)))
@settings(deadline=None, max_examples=50)
def test_any_values_make_valid_json_that_tells_which_are_not_finite(tmp_path_factory, metrics):
    metrics = {f"m/{name}": value for name, value in metrics.items()}
    directory = tmp_path_factory.mktemp("run")
    log = MetricsLog(directory, tensorboard=False)
    log.log(3, metrics)
    log.close()
    line = json.loads((directory / "metrics.jsonl").read_text(), parse_constant=refuse_constants)
    broken = {name for name, value in metrics.items() if not math.isfinite(value)}
    assert ("nonfinite" in line) == bool(broken)
    if broken:
        assert set(line["nonfinite"]) == broken
    for name, value in metrics.items():
        assert line[name] == (None if name in broken else value)


def test_a_nan_says_what_it_was(tmp_path):
    log = MetricsLog(tmp_path, tensorboard=False)
    log.log(0, {"loss": math.nan, "kl": -math.inf, "ok": 1.0})
    log.close()
    line = read_metrics(tmp_path)[0]
    assert (line["loss"], line["kl"], line["ok"]) == (None, None, 1.0)
    assert line["nonfinite"] == {"loss": "nan", "kl": "-inf"}


def test_a_resumed_log_repeats_no_step_and_drops_a_line_cut_short(tmp_path):
    log = MetricsLog(tmp_path, tensorboard=False)
    for step in range(6):
        log.log(step, {"loss": step})
    log.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')
    resumed = MetricsLog(tmp_path, start_step=4, tensorboard=False)
    resumed.log(4, {"loss": 40})
    resumed.close()
    assert [(line["step"], line["loss"]) for line in read_metrics(tmp_path)] == [
        (0, 0),
        (1, 1),
        (2, 2),
        (3, 3),
        (4, 40),
    ]


def test_tensorboard_gets_the_same_values(tmp_path):
    log = MetricsLog(tmp_path)
    log.log(7, {"train/loss": 0.125})
    log.close()
    scalars = [(event.step, value.tag, value.simple_value) for event, value in board_values(tmp_path)]
    assert scalars == [(7, "train/loss", 0.125)]


def board_values(run: Path) -> list[tuple[Event, Any]]:
    """Every value of the run's TensorBoard file with the event that holds it."""
    (file,) = (run / "tensorboard").iterdir()
    data, events = file.read_bytes(), []
    while data:  # a TFRecord: length (8), its checksum (4), the event, its checksum (4)
        length = int.from_bytes(data[:8], "little")
        events.append(Event.FromString(data[12 : 12 + length]))
        data = data[16 + length :]
    return [(event, value) for event in events for value in event.summary.value]


@pytest.fixture
def wandb(monkeypatch) -> list:
    """What a stand-in for wandb was told."""
    seen: list = []
    run = types.SimpleNamespace(log=lambda values, step: seen.append((step, values)), finish=lambda: seen.append("end"))
    fake: Any = types.ModuleType("wandb")
    fake.init = lambda **options: seen.append(options["name"]) or run
    fake.Image = lambda picture: ("image", picture.size)
    fake.Table = lambda columns, data: (columns, data)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return seen


def test_weights_and_biases_gets_the_same_values(tmp_path, wandb):
    log = MetricsLog(tmp_path / "my-run", tensorboard=False, wandb=True)
    log.log(2, {"loss": 0.5})
    log.close()
    assert wandb == ["my-run", (2, {"loss": 0.5}), "end"]


ROWS = [
    {"completion": "<b>left</b> | *right*\n_x_", "total": 0.5, "judge": None},
    {"completion": "a", "total": 1.0, "judge": 1.0},
]
PICTURES = [Image.new("RGB", (4, 3), "red"), Image.new("RGB", (2, 2), "blue")]


def test_a_table_goes_to_tensorboard_as_images_and_a_text_in_which_markup_is_text(tmp_path):
    log = MetricsLog(tmp_path)
    assert log.shows_pictures
    log.log_table(3, "rollouts", ROWS, PICTURES)
    log.close()
    values = {value.tag.removesuffix("/text_summary"): value for _, value in board_values(tmp_path)}
    assert {event.step for event, _ in board_values(tmp_path)} == {3}
    shown = np.asarray(Image.open(io.BytesIO(values["rollouts/0"].image.encoded_image_string)))
    assert np.array_equal(shown, np.asarray(PICTURES[0]))
    assert values["rollouts/1"].image.width == 2
    header, _, first, second = values["rollouts"].tensor.string_val[0].decode().splitlines()
    assert header == "| picture | completion | total | judge |"
    assert html.unescape(first) == "| 0 | <b>left</b> | *right* _x_ | 0.500 | – |"
    assert first.count("|") == 5
    assert not set("<*_>") & set(first)
    assert second == "| 1 | a | 1.000 | 1.000 |"


def test_a_table_goes_to_weights_and_biases_with_its_pictures(tmp_path, wandb):
    log = MetricsLog(tmp_path, tensorboard=False, wandb=True)
    log.log_table(3, "rollouts", ROWS, PICTURES)
    columns, cells = wandb[1][1]["rollouts"]
    assert wandb[1][0] == 3
    assert columns == ["picture", "completion", "total", "judge"]
    assert cells == [[("image", (4, 3)), *ROWS[0].values()], [("image", (2, 2)), *ROWS[1].values()]]


def test_a_log_without_tensorboard_and_weights_and_biases_shows_no_pictures(tmp_path):
    assert not MetricsLog(tmp_path, tensorboard=False).shows_pictures


def test_weights_and_biases_that_is_not_installed_is_told(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(InputError, match="fix: pip install wandb"):
        MetricsLog(tmp_path, tensorboard=False, wandb=True)


class FullDisk(io.StringIO):
    name = "metrics.jsonl"

    def write(self, text: str) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_is_told_by_the_files_name(tmp_path, monkeypatch):
    monkeypatch.setattr("pathlib.Path.open", lambda *_, **__: FullDisk())
    log = MetricsLog(tmp_path, tensorboard=False)
    with pytest.raises(InputError, match=r"metrics.jsonl: cannot write \(No space left on device\); fix: free space"):
        log.log(0, {"loss": 1.0})
