"""Evaluation as a whole: what it writes, and what must not change it."""

import json

import pytest

from sif_jax.config import EvalConfig
from sif_jax.data.photographs.build import build_photographs
from sif_jax.evals import evaluate as evaluation
from sif_jax.evals.evaluate import evaluate
from sif_jax.evals.statistics import METRICS, Summary
from sif_jax.models.qwen2_5_vl.layer_arrays import take_apart
from sif_jax.report.samples import read_samples
from tests.tiny_run import records_of, tiny_config, tiny_files, write_rows


def run(root, *overrides: str):
    return evaluate(tiny_config(EvalConfig, root, *overrides))


def lines(directory) -> list[dict]:
    return [json.loads(line) for line in (directory / "samples.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    return run(tmp_path_factory.mktemp("eval"))


def test_samples_and_summary_hold_what_the_report_reads(evaluated):
    rows, samples = records_of("test"), list(read_samples(evaluated / "samples.jsonl").values())
    assert [sample.problem for sample in samples] == [row["problem"] for row in rows]
    assert [sample.response for sample in samples] == [row["response"] for row in rows]
    assert [sample.family for sample in samples] == [row["family"] for row in rows]
    assert all(sample.image.is_file() and sample.depth_image.is_file() for sample in samples)
    assert {sample.finish_reason for sample in samples} <= {"stop", "length"}
    raw = json.loads((evaluated / "summary.json").read_text())
    summary = Summary.from_json(raw)
    assert (summary.questions, summary.scenes) == (8, 4)
    assert set(summary.metrics) == set(METRICS)
    assert set(summary.families) == {row["family"] for row in rows}
    assert (raw["model"], raw["skipped"]) == (str(tiny_files() / "model"), {})


def test_the_same_evaluation_twice_and_in_other_batches_gives_the_same_answers(tmp_path, evaluated):
    assert lines(run(evaluated.parent, "run.name=again")) == lines(evaluated)
    in_fives = run(tmp_path, "batch_size=5")
    assert [row["completion"] for row in lines(in_fives)] == [row["completion"] for row in lines(evaluated)]
    assert [row["scores"] for row in lines(in_fives)] == [row["scores"] for row in lines(evaluated)]


def test_layers_that_are_arrays_of_their_own_give_the_same_answers(evaluated, monkeypatch):
    taken = []
    monkeypatch.setattr(evaluation, "take_apart", lambda state: taken.append(state) or take_apart(state))
    assert lines(run(evaluated.parent, "run.name=apart", "model.scan_layers=false")) == lines(evaluated)
    assert len(taken) == 1


def test_a_bare_answer_is_judged_as_a_whole(tmp_path, monkeypatch):
    monkeypatch.setattr("sif_jax.models.qwen2_5_vl.chat.ChatProcessor.decode", lambda self, ids: "left")
    rows = records_of("test")
    for row in rows:
        row["response"] = "left"
        for image in ("image", "depth_image"):
            row[image] = str(tiny_files() / "scenes" / row[image])
    file = write_rows(tmp_path / "rows.json", rows)
    bare = lines(run(tmp_path, f"data.path={file}", "target=answer"))
    assert {(row["judge"], row["scores"]["answer"], row["scores"]["format"]) for row in bare} == {(1.0, 1.0, 0.0)}
    traced = lines(run(tmp_path, f"data.path={file}", "run.name=traced"))
    assert {row["judge"] for row in traced} == {0.0}


def test_a_limit_reads_the_first_rows_only(tmp_path, evaluated):
    limited = lines(run(tmp_path, "data.limit=3"))
    assert [row["id"] for row in limited] == ["1", "2", "3"]
    assert [row["completion"] for row in limited] == [row["completion"] for row in lines(evaluated)][:3]


def test_bad_rows_are_skipped_counted_and_keep_the_numbers_of_the_others(tmp_path, capsys, evaluated):
    rows = records_of("test")
    rows[1]["image"] = "none.png"
    rows[4]["normalized_solution_round"]["bbox_3d"] = [[0.5, 0.5, 0.1, 0.9]]
    file = write_rows(tmp_path / "rows.json", rows)
    scenes = tiny_files() / "scenes"
    directory = run(tmp_path, f"data.path={file}", f"data.image_root={scenes}", "data.on_error=skip")
    assert [row["id"] for row in lines(directory)] == ["1", "3", "4", "6", "7", "8"]
    expected = [row["completion"] for row in lines(evaluated) if row["id"] not in ("2", "5")]
    assert [row["completion"] for row in lines(directory)] == expected
    skipped = json.loads((directory / "summary.json").read_text())["skipped"]
    assert list(skipped) == ["2", "5"]
    told = capsys.readouterr().err
    assert "skipped 2 rows:" in told
    assert f"{file}: row 2: {scenes}/none.png: no such image" in told
    assert f"{file}: row 5: a gold box is inverted or empty" in told


@pytest.mark.parametrize(("depth_input", "seen"), [("true", {"motorcycle"}), ("false", None)])
def test_photographs_are_answered_with_depth_where_it_was_measured_and_without_elsewhere(tmp_path, depth_input, seen):
    pytest.importorskip("skimage", reason="the photographs come with scikit-image")
    photographs = build_photographs(tmp_path / "photographs")
    directory = run(
        tmp_path,
        f"data.path={photographs}",
        "data.on_error=skip",
        f"prompt.depth_input={depth_input}",
        "data.buckets.tokens=[128]",
    )
    answered = lines(directory)
    names = {row["image"].rsplit("/", 1)[1].removesuffix(".png") for row in answered}
    assert names == seen if seen else len(names) > 1
    for row in answered:
        assert (row["scores"]["total"] is None) == (row["depth_image"] is None)
