"""SIF-Scenes: questions, chains of thought and the builder."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from sif_jax.data.scenes import build
from sif_jax.data.scenes.build import build_scenes, make_scene
from sif_jax.data.scenes.camera import Camera
from sif_jax.data.scenes.config import FAMILIES, ScenesConfig
from sif_jax.data.scenes.questions import ask
from sif_jax.data.scenes.render import Scene, Surroundings
from sif_jax.data.scenes.solids import COLOURS, Solid
from sif_jax.data.scenes.view import View
from sif_jax.errors import InputError
from sif_jax.sif.boxes import WHOLE_IMAGE
from sif_jax.sif.depth_codec import box_mean_depth, decode_depth
from sif_jax.sif.grammar import parse
from sif_jax.sif.record import read_records

SMALL = ScenesConfig(sizes_px=((168, 112), (112, 168)), min_visible_px=40, questions_per_scene=4)
NUM_SCENES = 60


@pytest.fixture(scope="module")
def scenes():
    return [make_scene(SMALL, 0, "train", number) for number in range(1, NUM_SCENES + 1)]


@pytest.fixture(scope="module")
def records(scenes):
    return [record for scene in scenes for record in scene.records]


def hand_made_view() -> View:
    """From the left: a small red sphere in front, a large blue box midway, a small red box far off."""
    grey = (0.5, 0.5, 0.5)
    solids = (
        Solid("sphere", "red", "small", -1.0, 3.0, 0.3, 0.6, 0.0),
        Solid("box", "blue", "large", 0.0, 4.0, 0.5, 0.9, 0.0),
        Solid("box", "red", "small", 1.5, 6.0, 0.3, 0.5, 0.0),
    )
    boxes_norm = np.array([[0.1, 0.5, 0.2, 0.7], [0.4, 0.4, 0.6, 0.6], [0.8, 0.3, 0.9, 0.4]])
    camera = Camera(width_px=112, height_px=112, height_m=2.0, pitch=0.4, focal_px=120.0)
    scene = Scene(camera, Surroundings((grey, grey), 0.0, grey, 10.0, (0.0, 1.0, 0.0)), solids)
    return View(scene, boxes_norm, np.array([0.3, 0.5, 0.8]))


# Every question that the hand-made view allows, worked out by hand; letters are checked through their options.
TRUTH = {
    "Is the red sphere left of or right of the blue box?": "left",
    "Is the blue box left of or right of the red sphere?": "right",
    "Is the red sphere left of or right of the red box?": "left",
    "Is the red box left of or right of the red sphere?": "right",
    "Is the blue box left of or right of the red box?": "left",
    "Is the red box left of or right of the blue box?": "right",
    "Is the red sphere in front of or behind the blue box?": "in front",
    "Is the blue box in front of or behind the red sphere?": "behind",
    "Is the red sphere in front of or behind the red box?": "in front",
    "Is the red box in front of or behind the red sphere?": "behind",
    "Is the blue box in front of or behind the red box?": "in front",
    "Is the red box in front of or behind the blue box?": "behind",
    "Is there a red sphere?": "yes",
    "Is there a blue box?": "yes",
    "Is there a red box?": "yes",
    "Is there a blue sphere?": "no",
    "How many spheres are there?": "1",
    "How many boxes are there?": "2",
    "How many red objects are there?": "2",
    "How many blue objects are there?": "1",
    "Is the blue box larger than the red sphere?": "yes",
    "Is the red sphere larger than the blue box?": "no",
    "Is the blue box larger than the red box?": "yes",
    "Is the red box larger than the blue box?": "no",
    "Which is larger? the blue box, not the red sphere": "",
    "Which is larger? the blue box, not the red box": "",
    "Which is closer to the camera? the red sphere, not the blue box": "",
    "Which is closer to the camera? the red sphere, not the red box": "",
    "Which is closer to the camera? the blue box, not the red box": "",
    "Which is nearer to the red sphere? the blue box, not the red box": "",
    "Which is nearer to the blue box? the red sphere, not the red box": "",
    "Which is nearer to the red box? the blue box, not the red sphere": "",
    "What colour is the sphere?": "red",
    "What shape is the blue object?": "box",
}


def stated(problem: str, answer: str) -> tuple[str, str]:
    """A choice between A and B as the option chosen and the one left."""
    if " A. " not in problem:
        return problem, answer
    question, options = problem.split(" A. ")
    chosen, other = options.split(" B. ") if answer == "A" else reversed(options.split(" B. "))
    return f"{question} {chosen}, not {other}", ""


def test_a_hand_made_scene_is_asked_exactly_the_true_questions():
    view, rng = hand_made_view(), np.random.default_rng(0)
    families = [family for family in FAMILIES if family not in ("referring", "grounding")]
    questions = [ask(view, family, rng) for family in families for _ in range(150)]
    seen = {stated(question.problem, question.answer) for question in questions if question is not None}
    assert dict(seen) == TRUTH
    assert len(seen) == len(TRUTH)


def test_boxes_that_are_asked_for_are_the_answer():
    view, rng = hand_made_view(), np.random.default_rng(0)
    referring = {
        (q.problem.split("describes: ")[1], q.answer) for q in (ask(view, "referring", rng) for _ in range(200)) if q
    }
    sphere, blue, red = "[0.100,0.500,0.200,0.700]", "[0.400,0.400,0.600,0.600]", "[0.800,0.300,0.900,0.400]"
    assert referring == {
        ("the red sphere.", sphere),
        ("the blue box.", blue),
        ("the red box.", red),
        ("the leftmost box.", blue),
        ("the rightmost box.", red),
        ("the nearest box.", blue),
        ("the farthest box.", red),
    }
    grounding = {
        (q.problem.split("objects: ")[1].split(".")[0], q.answer)
        for q in (ask(view, "grounding", rng) for _ in range(200))
        if q
    }
    assert ("box", f"[{blue},{red}]") in grounding
    assert ("red box, red sphere", f"[{red},{sphere}]") in grounding


def test_an_existence_question_answered_no_points_at_everything_of_that_colour():
    view = hand_made_view()
    view = replace(view, scene=replace(view.scene, solids=(*view.solids[:2], replace(view.solids[2], kind="cone"))))
    rng = np.random.default_rng(0)
    gold = {q.problem: q.gold for q in (ask(view, "existence", rng) for _ in range(100)) if q and q.answer == "no"}
    assert gold["Is there a red box?"] == (0, 2)
    assert gold["Is there a blue cone?"] == (1,)


def test_a_scene_of_two_like_solids_leaves_out_what_it_cannot_ask():
    view = hand_made_view()
    alike = View(replace(view.scene, solids=view.solids[1:]), view.boxes_norm[1:], view.depths_norm[1:])
    rng = np.random.default_rng(0)
    assert ask(alike, "distance", rng) is None
    assert ask(alike, "existence", rng) is None


def test_every_chain_is_well_formed_short_and_ends_on_the_gold_boxes(records):
    for record in records:
        trace = parse(record.completion)
        assert trace.well_formed, (record.completion, trace.violations)
        assert trace.answer == record.response
        assert 2 <= len(trace.areas) <= SMALL.max_areas
        assert trace.areas[0][0].box_norm == WHOLE_IMAGE
        assert tuple(item.box_norm for item in trace.areas[-1]) == record.gold_boxes
        assert all(3 <= len(text.split()) <= 16 for text in trace.texts)
        assert len(record.completion) < 900
        assert 1 <= len(record.gold_boxes) <= 3


def test_every_depth_is_that_of_the_decoded_map(scenes):
    for scene in scenes:
        depth_norm = decode_depth(scene.depth_rgb)
        for record in scene.records:
            for item in itertools.chain.from_iterable(parse(record.completion).areas):
                mean = box_mean_depth(depth_norm, item.box_norm)
                assert mean is not None
                assert item.depth == pytest.approx(mean, abs=0.00051)
                assert abs(item.depth - mean) <= 0.02 * mean


def test_a_gold_box_shows_the_colour_that_the_question_names(scenes):
    asked = [(scene, r) for scene in scenes for r in scene.records if r.problem.startswith("What colour is")]
    for scene, record in asked:
        h, w = scene.rgb.shape[:2]
        x1, y1, x2, y2 = record.gold_boxes[0]
        patch = scene.rgb[round(y1 * h) : round(y2 * h), round(x1 * w) : round(x2 * w)].reshape(-1, 3).astype(float)
        wanted = np.array(COLOURS[record.response])
        direction = patch / np.maximum(np.linalg.norm(patch, axis=1, keepdims=True), 1)
        assert (direction @ (wanted / np.linalg.norm(wanted)) > 0.985).mean() > 0.3
    assert len(asked) > 5


def test_families_come_by_weight_and_no_constant_answer_wins(records):
    families = Counter(record.extra["family"] for record in records)
    assert set(families) == set(FAMILIES)
    assert min(families.values()) > 0.7 * len(records) / len(FAMILIES)
    for family in FAMILIES:
        answers = Counter(record.response for record in records if record.extra["family"] == family)
        assert answers.most_common(1)[0][1] <= 0.66 * families[family], (family, answers)


@pytest.mark.parametrize(("rate", "expected"), [(0.0, 0), (1.0, 0.7)])
def test_the_distractor_rate_is_obeyed_where_there_is_room(rate, expected):
    config = replace(SMALL, distractor_rate=rate, families=(("attribute", 1.0),), questions_per_scene=1)
    made = [make_scene(config, 1, "train", number) for number in range(1, 17)]
    misses = ["No sign of" in str(scene.records[0].completion) for scene in made]
    assert np.mean(misses) >= expected
    assert rate > 0 or not any(misses)


def test_a_distractor_never_touches_the_target(records):
    seen = 0
    for record in records:
        for step in parse(record.completion).steps:
            if step.text.startswith("No sign of"):
                (x1, y1, x2, y2) = step.boxes[0].box_norm
                seen += 1
                for gx1, gy1, gx2, gy2 in record.gold_boxes:
                    overlap = max(0, min(x2, gx2) - max(x1, gx1)) * max(0, min(y2, gy2) - max(y1, gy1))
                    assert overlap <= 0.001 * (x2 - x1) * (y2 - y1) + 0.001 * (gx2 - gx1) * (gy2 - gy1)
    assert seen > 10


def test_no_two_splits_share_a_scene_and_the_seed_decides_the_bytes():
    config = replace(SMALL, questions_per_scene=1)
    made = [make_scene(config, seed, split, n) for seed in (0, 1) for split in ("train", "rl", "test") for n in (1, 2)]
    assert len({scene.rgb.tobytes() for scene in made}) == len(made)
    again = make_scene(config, 0, "rl", 2)
    assert again.records == made[3].records
    assert again.rgb.tobytes() == made[3].rgb.tobytes()


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


SPLITS = {"train": 2, "test": 1}


def test_two_workers_write_the_same_bytes_as_one(tmp_path):
    config = replace(SMALL, questions_per_scene=2)
    paths = build_scenes(tmp_path / "one", config, SPLITS, seed=5)
    build_scenes(tmp_path / "two", config, SPLITS, seed=5, workers=2)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    rows = read_records(paths["train"])
    assert [record.extra["scene"] for record in rows.records] == [f"train-{n:05d}" for n in (1, 1, 2, 2)]
    for record in rows.records:
        with (
            Image.open(rows.image_root / record.image) as image,
            Image.open(rows.image_root / record.depth_image) as depth,
        ):
            assert image.size == depth.size in SMALL.sizes_px
        assert {"family", "solids"} <= set(record.extra)


def test_a_finished_build_is_kept_and_another_config_or_seed_builds_anew(tmp_path, monkeypatch):
    made = []
    write_scene = build._write_scene
    monkeypatch.setattr(build, "_write_scene", lambda *a: made.append(a) or write_scene(*a))
    for config, seed, expected in [(SMALL, 0, 3), (SMALL, 0, 3), (SMALL, 1, 6), (replace(SMALL, max_areas=3), 1, 9)]:
        build_scenes(tmp_path, config, SPLITS, seed)
        assert len(made) == expected


def test_an_interrupted_build_does_not_look_finished(tmp_path, monkeypatch):
    build_scenes(tmp_path, SMALL, SPLITS, seed=0)
    write_scene = build._write_scene

    def interrupted(out_dir, config, seed, job):
        if job == ("test", 1):
            raise KeyboardInterrupt
        return write_scene(out_dir, config, seed, job)

    monkeypatch.setattr(build, "_write_scene", interrupted)
    with pytest.raises(KeyboardInterrupt):
        build_scenes(tmp_path, SMALL, SPLITS, seed=1)
    assert not (tmp_path / "manifest.json").exists()
    monkeypatch.setattr(build, "_write_scene", write_scene)
    build_scenes(tmp_path, SMALL, SPLITS, seed=1)
    assert json.loads((tmp_path / "manifest.json").read_text())["seed"] == 1


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_solids": (1, 3)}, "num_solids"),
        ({"num_solids": (4, 3)}, "num_solids"),
        ({"families": (("weather", 1.0),)}, "weather"),
        ({"families": (("size", 0.0),)}, "positive weight"),
        ({"families": ()}, "families"),
        ({"questions_per_scene": 10}, "questions_per_scene"),
        ({"sizes_px": ((300, 224),)}, "multiples of 56"),
        ({"max_areas": 1}, "max_areas"),
        ({"distractor_rate": 1.5}, "distractor_rate"),
        ({"min_visible_fraction": 0.0}, "min_visible_fraction"),
    ],
)
def test_an_impossible_config_is_refused_in_one_line(change, words):
    with pytest.raises(InputError, match=words):
        ScenesConfig(**change)


@pytest.mark.parametrize("splits", [{"../train": 1}, {"manifest": 1}, {"train": 0}])
def test_a_split_without_a_plain_name_or_a_scene_is_refused(tmp_path, splits):
    with pytest.raises(InputError, match="split"):
        build_scenes(tmp_path, SMALL, splits, seed=0)


def test_families_that_the_scenes_cannot_be_asked_are_refused(monkeypatch):
    monkeypatch.setattr(build, "ATTEMPTS", 3)
    config = replace(SMALL, num_solids=(2, 2), families=(("distance", 1.0),), questions_per_scene=1)
    with pytest.raises(InputError, match="three solids"):
        make_scene(config, 0, "train", 1)
