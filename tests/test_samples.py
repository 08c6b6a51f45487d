"""What a policy writes: the files of samples, and the traces drawn on images."""

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from sif_jax.config import GrpoConfig
from sif_jax.data.feed import Feed, open_feed
from sif_jax.errors import InputError
from sif_jax.models.qwen2_5_vl.checkpoint import open_processor
from sif_jax.models.qwen2_5_vl.config import Qwen2_5_VLConfig
from sif_jax.report.samples import read_groups
from sif_jax.rewards import score
from sif_jax.rollout.engine import Rollout
from sif_jax.sif.grammar import BoxDepth, Step, parse, render
from sif_jax.training.feedback import Feedback
from sif_jax.training.metrics import MetricsLog
from sif_jax.training.samples import SampleLog, best_and_worst
from sif_jax.training.trace_picture import FIRST_STEP, GAP, GOLD, LAST_STEP, SIDE, draw_trace, shade
from tests.test_metrics import board_values
from tests.tiny_run import tiny_config

GOOD = render([Step((BoxDepth((0.1, 0.1, 0.5, 0.5), 0.25),), "There.")], "left")


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> GrpoConfig:
    return tiny_config(GrpoConfig, tmp_path_factory.mktemp("runs"), "run.samples_every=3")


@pytest.fixture(scope="module")
def feed(config) -> Feed:
    vision = Qwen2_5_VLConfig.from_directory(Path(config.model.path)).vision
    return open_feed(config.data, config.prompt, open_processor(config.model), vision, target="none", batch_size=2)


def feedback_of(feed: Feed, ids: np.ndarray) -> tuple[Rollout, Feedback]:
    """Two prompts with a good, a truncated and an unjudged completion each."""
    completions = [GOOD, "<think>", "x"] * 2
    judged = np.array([1.0, 0.0, np.nan] * 2)
    records = [feed.records[index] for index in np.repeat(ids, 3)]
    scores = score(completions, records, judge_scores=judged, depth_maps=feed.depth_maps(np.repeat(ids, 3)))
    finished = jnp.array([[True, False, True]] * 2)
    rollout = Rollout(jnp.zeros((2, 3, 8), int), jnp.zeros((2, 3, 8)), jnp.full((2, 3), 8), finished)
    feedback = Feedback(
        completions,
        datasets=[feed.records[index].dataset for index in ids],
        judged=judged.reshape(2, 3),
        scores=scores,
        advantages=np.array([[1.0, -1.0, 0.0]] * 2),
        counters={},
    )
    return rollout, feedback


def logged(run: Path, config: GrpoConfig, feed: Feed, *steps: int, log: MetricsLog | None = None) -> list[Path]:
    run.mkdir(exist_ok=True)
    samples = SampleLog(run, config, feed, log or MetricsLog(run, tensorboard=False))
    ids = np.array([3, 1])
    for step in steps:
        samples.log(step, ids, *feedback_of(feed, ids))
    return sorted((run / "samples").glob("*"))


def test_the_first_step_and_every_third_are_written_one_line_per_completion(tmp_path, config, feed):
    files = logged(tmp_path, config, feed, *range(7))
    assert [file.name for file in files] == ["step-0.jsonl", "step-2.jsonl", "step-5.jsonl"]
    rows = [json.loads(line) for line in files[1].read_text().splitlines()]
    assert [(row["step"], row["group"], row["id"], row["sample"]) for row in rows] == [
        *((2, 0, "4", sample) for sample in range(3)),
        *((2, 1, "2", sample) for sample in range(3)),
    ]
    first, cut, unjudged = rows[:3]
    record = feed.records[3]
    assert record.problem in first["prompt"]
    assert first["areas"] == [[{"bbox_2d": [0.1, 0.1, 0.5, 0.5], "depth": 0.25}]]
    assert (first["completion"], first["judge"], first["advantage"], first["finish_reason"]) == (GOOD, 1, 1, "stop")
    assert first["scores"]["format"] == 1
    assert (cut["finish_reason"], cut["areas"], cut["scores"]["total"]) == ("length", [], 0)
    assert (unjudged["judge"], unjudged["scores"]["answer"], unjudged["scores"]["total"]) == (None, None, None)
    assert (files[1].parent / first["image"]).resolve() == (feed.file.image_root / record.image).resolve()


def test_a_line_is_also_a_sample_of_the_report(tmp_path, config, feed):
    (file,) = logged(tmp_path, config, feed, 0)
    groups = read_groups(file)
    assert [(attempt.id, attempt.sample) for group in groups for attempt in group] == [
        *(("4", sample) for sample in range(3)),
        *(("2", sample) for sample in range(3)),
    ]
    assert groups[0][0].image.is_file()


def test_a_step_that_a_resumed_run_repeats_replaces_its_file(tmp_path, config, feed):
    (file,) = logged(tmp_path, config, feed, 0)
    before = file.read_text()
    file.write_text("old")
    assert logged(tmp_path, config, feed, 0) == [file]
    assert file.read_text() == before


def test_null_writes_nothing(tmp_path, feed):
    config = tiny_config(GrpoConfig, tmp_path, "run.samples_every=null")
    assert logged(tmp_path, config, feed, 0, 1, 2) == []


def test_a_directory_that_cannot_be_written_is_told(tmp_path, config, feed):
    (tmp_path / "samples").write_text("a file")
    with pytest.raises(InputError, match=r"step-0\.jsonl"):
        logged(tmp_path, config, feed, 0)


def test_tensorboard_shows_the_best_and_the_worst_of_each_group(tmp_path, config, feed):
    log = MetricsLog(tmp_path)
    logged(tmp_path, config, feed, 0, log=log)
    log.close()
    tags = [value.tag for _, value in board_values(tmp_path)]
    assert tags == ["rollouts/text_summary", *(f"rollouts/{number}" for number in range(4))]
    table = board_values(tmp_path)[0][1].tensor.string_val[0].decode()
    assert [line.split(" | ")[-1] for line in table.splitlines()[2:]] == ["1.000 |", "-1.000 |"] * 2


def test_the_best_and_the_worst_are_chosen_by_advantage_within_each_group():
    rows = [{"group": group, "sample": n, "advantage": a} for group in (0, 1) for n, a in enumerate((0.5, -2.0, 1.5))]
    assert [(row["group"], row["sample"]) for row in best_and_worst(rows)] == [(0, 2), (0, 1), (1, 2), (1, 1)]


def test_shades_run_from_light_to_dark_and_a_single_step_is_dark():
    assert (shade(0, 3), shade(2, 3), shade(0, 1)) == (FIRST_STEP, LAST_STEP, LAST_STEP)
    assert [sum(shade(step, 8)) for step in range(8)] == sorted((sum(shade(s, 8)) for s in range(8)), reverse=True)


def test_boxes_stand_where_they_are_on_the_image_and_on_the_depth_map(tmp_path):
    for name in ("image", "depth"):
        Image.new("RGB", (200, 100), "white").save(tmp_path / f"{name}.png")
    steps = [
        Step((BoxDepth((0.0, 0.0, 1.0, 1.0), 0.5),), "All."),
        Step((BoxDepth((0.5, 0.25, 0.75, 0.75), 0.2),), "It."),
    ]
    trace = parse(render(steps, "a"))
    picture = draw_trace(trace, [(0.1, 0.2, 0.3, 0.6)], tmp_path / "image.png", tmp_path / "depth.png")
    assert picture.size == (2 * SIDE + GAP, SIDE // 2)
    pixels = np.asarray(picture)
    for left in (0, SIDE + GAP):
        panel = pixels[:, left : left + SIDE]
        assert tuple(panel[-1, SIDE // 2]) == FIRST_STEP
        assert edges(panel, LAST_STEP) == pytest.approx([0.5, 0.25, 0.75, 0.75], abs=0.02)
        assert edges(panel, GOLD) == pytest.approx([0.1, 0.2, 0.3, 0.6], abs=0.02)


def edges(panel: np.ndarray, colour: tuple[int, int, int]) -> list[float]:
    """The box that pixels of a colour span, normalised."""
    rows, columns = np.nonzero((panel == colour).all(-1))
    height, width = panel.shape[:2]
    return [columns.min() / width, rows.min() / height, columns.max() / width, rows.max() / height]


@pytest.mark.parametrize(
    "completion", ["", "no trace", render([Step((BoxDepth((0.2, 0.2, 0.201, 0.9), 0.0),) * 50, "t")] * 20, "a")]
)
def test_any_trace_can_be_drawn_without_a_depth_map(tmp_path, completion):
    Image.new("RGB", (30, 90)).save(tmp_path / "image.png")
    picture = draw_trace(parse(completion), [], tmp_path / "image.png", None)
    assert picture.size == (SIDE // 3, SIDE)


def test_a_depth_that_cannot_be_read_is_drawn_as_a_question(tmp_path):
    Image.new("RGB", (60, 60)).save(tmp_path / "image.png")
    area = '<think><area>[{"bbox_2d":[0,0,1,1],"depth":true}]</area><text>t</text></think><answer>a</answer>'
    assert draw_trace(parse(area), [], tmp_path / "image.png", tmp_path / "image.png").size == (2 * SIDE + GAP, SIDE)
