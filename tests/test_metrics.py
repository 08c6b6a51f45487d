"""Metrics: valid JSON for any value, and no step twice after a resume."""

import errno
import io
import json
import math
import os
import sys
import types

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
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
    (file,) = (tmp_path / "tensorboard").iterdir()
    data, events = file.read_bytes(), []
    while data:  # a TFRecord: length (8), its checksum (4), the event, its checksum (4)
        length = int.from_bytes(data[:8], "little")
        events.append(Event.FromString(data[12 : 12 + length]))
        data = data[16 + length :]
    scalars = [(event.step, value.tag, value.simple_value) for event in events for value in event.summary.value]
    assert scalars == [(7, "train/loss", 0.125)]


def test_weights_and_biases_gets_the_same_values(tmp_path, monkeypatch):
    seen = []
    run = types.SimpleNamespace(log=lambda values, step: seen.append((step, values)), finish=lambda: seen.append("end"))
    fake = types.ModuleType("wandb")
    fake.init = lambda **options: seen.append(options["name"]) or run
    monkeypatch.setitem(sys.modules, "wandb", fake)
    log = MetricsLog(tmp_path / "my-run", tensorboard=False, wandb=True)
    log.log(2, {"loss": 0.5})
    log.close()
    assert seen == ["my-run", (2, {"loss": 0.5}), "end"]


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
