"""What is wrong with a user's files is told in one line that names file, row, value, expectation and fix."""

import json
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image
from safetensors.numpy import load_file, save_file

from sif_jax.cli import main
from sif_jax.config import SftConfig, flat_config
from tests.conftest import ROOT
from tests.tiny_run import records_of, tiny_config, tiny_files, write_rows

Usage = namedtuple("Usage", "total used free")
BAD = 3  # the row that is spoilt, counted from 1


@pytest.fixture
def rows(tmp_path):
    """Three rows with their images, to be spoilt."""
    rows = records_of("sft")[: 2 * BAD : 2]
    for row in rows:
        for key in ("image", "depth_image"):
            (tmp_path / row[key]).parent.mkdir(exist_ok=True)
            shutil.copy(tiny_files() / "scenes" / row[key], tmp_path / row[key])
    return rows


def arguments(root: Path, *overrides: str) -> list[str]:
    config = tiny_config(SftConfig, root, f"data.path={root / 'rows.json'}", "batch_size=2", "max_steps=1", *overrides)
    given = flat_config(config).items()
    return ["sft", *(f"{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in given)]


def refused(root: Path, *overrides: str) -> str:
    """The one line of a command that fails, which must leave no model and no checkpoint behind."""
    before = {path.name for path in root.iterdir()}
    result = CliRunner().invoke(main, arguments(root, *overrides))
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    *progress, line = result.stderr.splitlines()
    assert line.startswith("error: ")
    assert all(shown.startswith(("sft: ", "attention: ")) for shown in progress), result.stderr
    assert {path.name for path in root.iterdir()} - before <= {"run"}
    left = {path.name for path in root.glob("run/**/*")}
    assert left <= {"config.yaml", "checkpoints", "metrics.jsonl"}
    return line


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:300])


def test_a_missing_image_is_told(tmp_path, rows):
    (tmp_path / rows[BAD - 1]["image"]).unlink()
    told = refused(tmp_path_with(tmp_path, rows))
    image = tmp_path / rows[BAD - 1]["image"]
    assert told == (
        f"error: {tmp_path}/rows.json: row {BAD}: {image}: no such image; fix: check image_root and the row's path"
    )


def tmp_path_with(root: Path, rows: list[dict]) -> Path:
    write_rows(root / "rows.json", rows)
    return root


def test_a_truncated_image_is_told(tmp_path, rows):
    truncate(tmp_path / rows[BAD - 1]["depth_image"])
    told = refused(tmp_path_with(tmp_path, rows))
    assert f"rows.json: row {BAD}: {tmp_path / rows[BAD - 1]['depth_image']}: the image cannot be read" in told
    assert "fix: replace the file" in told


def test_an_image_bomb_is_told_before_it_is_opened(tmp_path, rows, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    told = refused(tmp_path_with(tmp_path, rows))
    assert "the image is too large" in told
    assert "fix: downscale it" in told


def test_a_depth_image_of_another_size_is_told_with_both_sizes(tmp_path, rows):
    depth = tmp_path / rows[BAD - 1]["depth_image"]
    with Image.open(depth) as image:
        width, height = image.size
    Image.new("L", (width // 2, height)).save(depth)
    told = refused(tmp_path_with(tmp_path, rows))
    assert f"row {BAD}: {depth}: the depth image has another size than its image" in told
    assert f"got '{width // 2}x{height}'; expected {width}x{height}; fix: " in told


@pytest.mark.parametrize(
    ("box", "problem", "expected"),
    [
        ([0.1, 0.2, 1.3, 0.9], "outside the image", "coordinates in [0, 1]"),
        ([0.5, 0.2, 0.1, 0.9], "inverted or empty", "x1 < x2 and y1 < y2"),
    ],
)
def test_an_impossible_box_is_told_with_its_row_and_its_numbers(tmp_path, rows, box, problem, expected):
    rows[BAD - 1]["normalized_solution_round"]["bbox_3d"] = [box]
    told = refused(tmp_path_with(tmp_path, rows))
    assert f"rows.json: row {BAD}: a gold box is {problem}; got {box}; expected {expected}; fix: " in told


def test_malformed_json_is_told_by_its_line(tmp_path, rows):
    (tmp_path / "rows.json").write_text('[\n{"image": "a.png"},\n{"image": }\n]')
    told = refused(tmp_path)
    assert "rows.json: malformed JSON at line 3 column 11 (Expecting value); fix: " in told


@pytest.fixture
def checkpoint(tmp_path):
    """A copy of the tiny checkpoint, to be spoilt by a function of its tensors."""
    shutil.copytree(tiny_files() / "model", tmp_path / "model")

    def spoil(change) -> str:
        tensors = load_file(tmp_path / "model/model.safetensors")
        change(tensors)
        save_file(tensors, tmp_path / "model/model.safetensors")
        return f"model.path={tmp_path / 'model'}"

    return spoil


NORM = "model.norm.weight"


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda tensors: tensors.pop(NORM), "tensors are missing; got 'model.norm.weight'; fix: "),
        (
            lambda tensors: tensors.update({"model.more.weight": np.ones(2, np.float32)}),
            "1 tensors belong to no layer of the config; got 'model.more.weight'; fix: ",
        ),
        (
            lambda tensors: tensors.update({NORM: np.ones(5, np.float32)}),
            "tensor model.norm.weight has the wrong shape; got (5,); expected (32,)",
        ),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_told_by_the_tensors_name(tmp_path, rows, checkpoint, change, told):
    line = refused(tmp_path_with(tmp_path, rows), checkpoint(change))
    assert line.startswith(f"error: {tmp_path / 'model'}")
    assert told in line


def test_an_unknown_key_is_told_with_the_nearest_one(tmp_path, rows):
    tmp_path_with(tmp_path, rows)
    result = CliRunner().invoke(main, [*arguments(tmp_path), "data.imageroot=x"])
    assert result.exit_code == 2
    assert result.stderr == (
        "error: command line: unknown key data.imageroot; got 'x'; fix: did you mean data.image_root?\n"
    )
    assert not (tmp_path / "run").exists()


def test_a_full_disk_while_saving_is_told_and_leaves_nothing_half_written(tmp_path, rows, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10**6, 10**6, 10))
    told = refused(tmp_path_with(tmp_path, rows))
    assert f"{tmp_path}/run/checkpoints: cannot write a checkpoint (No space left on device)" in told
    assert "fix: free space" in told
    assert list((tmp_path / "run/checkpoints").iterdir()) == []


def test_the_process_itself_prints_no_traceback(tmp_path, rows):
    truncate(tmp_path / rows[0]["image"])
    tmp_path_with(tmp_path, rows)
    code = "from sif_jax.cli import main; main(prog_name='sif-jax')"
    done = subprocess.run([sys.executable, "-c", code, *arguments(tmp_path)], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2
    *told, line = done.stderr.splitlines()
    assert line.startswith(f"error: {tmp_path}/rows.json: row 1: ")
    assert told == ["attention: flash (cpu)"]


def test_skipped_rows_are_counted_and_listed_and_the_run_goes_on(tmp_path, rows):
    (tmp_path / rows[BAD - 1]["image"]).unlink()
    rows.insert(0, {**rows[0], "response": 5})
    tmp_path_with(tmp_path, rows)
    result = CliRunner().invoke(main, arguments(tmp_path, "data.on_error=skip", "max_steps=2"))
    assert (result.exit_code, result.stdout) == (0, f"{tmp_path}/run\n")
    assert "skipped 2 rows:\n" in result.stderr
    assert f"  {tmp_path}/rows.json: row 1: 'response' has the wrong type" in result.stderr
    assert f"  {tmp_path}/rows.json: row {BAD + 1}: " in result.stderr
    assert (tmp_path / "run/model/config.json").is_file()
