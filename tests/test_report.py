"""The HTML report: curves, charts, traces, escaping, and the page as a whole."""

import base64
import io
import json
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from sif_jax.errors import InputError
from sif_jax.report.charts import Scale, curve_chart, number_label
from sif_jax.report.curves import MAX_POINTS, Curve, read_curves
from sif_jax.report.images import MAX_SIDE, embed
from sif_jax.report.markup import element
from sif_jax.report.page import write_report
from sif_jax.report.samples import choose, choose_steps, read_samples
from sif_jax.report.stages import Stage
from sif_jax.sif.depth_codec import encode_depth
from sif_jax.sif.grammar import BoxDepth, Step, render
from tests.report_runs import write_evaluation, write_grpo_metrics, write_samples, write_sft_metrics

FACTS = {"machine": "1 × H200", "seed": "0"}


class Page(HTMLParser):
    """The tags, attributes and texts of a page; fails on tags that do not nest."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self._open: list[str] = []
        self.feed(html)
        self.close()
        assert not self._open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag != "meta":
            self._open.append(tag)

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)

    def rects(self, class_: str) -> list[list[float]]:
        """x, y, width and height of the rectangles of a class."""
        found = [attrs for tag, attrs in self.tags if tag == "rect" and attrs.get("class") == class_]
        return [[float(attrs[key] or "nan") for key in ("x", "y", "width", "height")] for attrs in found]

    @property
    def text(self) -> str:
        return " ".join(self.texts)


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    for name, skill in (("untrained", 0.1), ("sft", 0.6), ("grpo", 0.8)):
        write_evaluation(folder / name, 10, skill)
    write_sft_metrics(folder / "sft" / "metrics.jsonl", 60)
    write_grpo_metrics(folder / "grpo" / "metrics.jsonl", 30)
    return folder


@pytest.fixture
def trace_folder(tmp_path) -> Path:
    """A folder with a 100 x 50 image whose depth map is 0.25 on the left half and 0.75 on the right."""
    Image.new("RGB", (100, 50), "white").save(tmp_path / "image.png")
    depth = np.where(np.arange(100) < 50, 0.25, 0.75) * np.ones((50, 1))
    Image.fromarray(encode_depth(depth)).save(tmp_path / "depth.png")
    return tmp_path


def question(completion: str, **changes) -> dict:
    scores = dict.fromkeys(("format", "answer", "bbox", "depth", "hiou_first", "hiou_last", "hiou_gain"), 0.5)
    return {
        "id": "q0",
        "scene": "s0",
        "family": "position",
        "image": "image.png",
        "depth_image": "depth.png",
        "problem": "Where is it?",
        "gold_boxes": [[0.1, 0.2, 0.3, 0.6]],
        "response": "left",
        "completion": completion,
        "scores": scores | {"total": 2.0, "depth_consistency": 1.0},
        "judge": 1.0,
        "finish_reason": "stop",
    } | changes


def report_of(folder: Path, *samples: dict, name: str = "SFT") -> Page:
    path = folder / "report.html"
    write_report(path, title="T", facts=FACTS, stages=[Stage(name, None, write_samples(folder, list(samples)))])
    return Page(path.read_text(encoding="utf-8"))


def test_text_and_attributes_are_escaped_and_elements_are_not_escaped_twice():
    inner = element("b", "<&>", title='"')
    assert element("p", inner, "<i>", stroke_width=1.5) == (
        '<p stroke-width="1.5"><b title="&quot;">&lt;&amp;&gt;</b>&lt;i&gt;</p>'
    )


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [(0, 1, [0, 0.5, 1]), (-0.3, 0.31, [-0.2, 0, 0.2]), (11_000, 12_500, [11_000, 11_500, 12_000, 12_500])],
)
def test_ticks_are_round_numbers_inside_the_range(low, high, ticks):
    assert Scale(float(low), float(high), 0.0, 100.0).ticks(4) == pytest.approx(ticks)


@settings(deadline=None)
@given(st.floats(-1e6, 1e6), st.floats(1e-6, 1e6), st.integers(2, 6))
def test_ticks_are_evenly_spaced_and_never_too_many(low, span, target):
    ticks = np.array(Scale(low, low + span, 0.0, 1.0).ticks(target))
    assert len(ticks) <= target + 1
    assert (ticks >= low - 1e-6 * span - 1e-9).all()
    assert (ticks <= low + span + 1e-6 * span + 1e-9).all()
    assert np.diff(ticks, 2) == pytest.approx(0, abs=1e-6 * max(abs(low), span))


def test_numbers_are_labelled_shortly():
    labels = [number_label(value) for value in (0.0, 0.25, -1.5, 12_000.0, 1e-4, -2.5e-7)]
    assert labels == ["0", "0.25", "−1.5", "12k", "1e−4", "−2.5e−7"]


def test_curves_leave_out_nulls_the_clock_and_a_line_that_a_kill_cut_short(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(
        '{"step": 1, "time": 1e9, "loss": 2.0, "kl": null}\n{"step": 3, "time": 1e9, "loss": 1.0, "kl": 0.5}\n{"ste'
    )
    curves = read_curves(path)
    assert set(curves) == {"loss", "kl"}
    assert (curves["loss"].steps.tolist(), curves["loss"].values.tolist()) == ([1, 3], [2, 1])
    assert curves["kl"].steps.tolist() == [3]


@pytest.mark.parametrize("line", ["loss 3", '{"loss": 1.0}', "[1]", '{"step": "one"}'])
def test_a_metrics_line_without_a_step_is_refused_with_its_row(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 2.0}\n' + line + "\n")
    with pytest.raises(InputError, match="row 2"):
        read_curves(path)


def test_smoothing_is_the_mean_of_the_points_within_half_a_window():
    values = np.zeros(40)
    values[20], values[39] = 3.0, 4.0
    curve = Curve(np.arange(40.0), values)
    assert curve.window == 3
    smoothed = curve.smoothed().values
    assert smoothed[[18, 19, 20, 21, 22]] == pytest.approx([0, 1, 1, 1, 0])
    assert smoothed[39] == pytest.approx(2)  # only two points exist at the end


@settings(deadline=None)
@given(st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=200))
def test_any_curve_can_be_drawn_inside_its_chart(values):
    svg = Page(curve_chart("loss", Curve(np.arange(len(values), dtype=float), np.array(values)), "#000"))
    _, _, width, height = map(float, (svg.tags[0][1]["viewbox"] or "").split())
    for points in (attrs["points"] for tag, attrs in svg.tags if tag == "polyline"):
        xy = np.array([pair.split(",") for pair in (points or "").split()], float)
        assert ((xy >= 0) & (xy <= [width, height])).all()


def test_a_long_curve_is_thinned_and_keeps_its_ends():
    curve = Curve(np.arange(10_000.0), np.arange(10_000.0)).thinned()
    assert len(curve.steps) == MAX_POINTS
    assert (curve.steps[0], curve.steps[-1]) == (0, 9_999)


def test_a_photograph_becomes_a_small_jpeg_and_a_drawing_a_lossless_png():
    noise = np.random.default_rng(0).integers(0, 256, (600, 800, 3), dtype=np.uint8)
    photograph, drawing = embed(Image.fromarray(noise)), embed(Image.new("RGB", (80, 40), "red"))
    assert photograph.address.startswith("data:image/jpeg;base64,")
    assert (photograph.width, photograph.height) == (MAX_SIDE, MAX_SIDE * 3 // 4)
    assert drawing.address.startswith("data:image/png;base64,")
    decoded = Image.open(io.BytesIO(base64.b64decode(drawing.address.split(",")[1])))
    assert decoded.size == (drawing.width, drawing.height) == (80, 40)


def test_the_best_the_typical_the_worst_and_one_of_each_family_are_chosen_once(tmp_path):
    rows = [question("", id=f"q{n}", family="even" if n % 2 == 0 else "odd") for n in range(9)]
    for n, row in enumerate(rows):
        row["scores"] = row["scores"] | {"total": float(n)}
    chosen = choose(list(read_samples(write_samples(tmp_path, rows)).values()), each=1)
    assert list(chosen.items())[:3] == [
        ("q8", "highest total reward"),
        ("q4", "typical: median total reward"),
        ("q0", "lowest total reward"),
    ]
    assert list(chosen.items())[3:] == [("q3", "median of odd")]  # the median of even is q4, which is shown already


@pytest.mark.parametrize("broken", ["not json", "{}", '{"id": 1, "scores": 2}'])
def test_a_broken_line_of_samples_is_refused_with_its_row(tmp_path, broken):
    path = write_samples(tmp_path, [question("")])
    path.write_text(path.read_text() + broken + "\n")
    with pytest.raises(InputError, match=r"samples\.jsonl: row 2"):
        read_samples(path)


def test_the_page_stands_alone_and_shows_facts_table_curves_and_traces_of_every_stage(runs):
    path = runs / "report.html"
    stages = [
        Stage("untrained", None, runs / "untrained" / "samples.jsonl"),
        Stage("SFT", runs / "sft" / "metrics.jsonl", runs / "sft" / "samples.jsonl"),
        Stage("SFT + GRPO-SIF", runs / "grpo" / "metrics.jsonl", runs / "grpo" / "samples.jsonl"),
    ]
    extra = {"Photographs": {"SFT": runs / "sft" / "samples.jsonl"}}
    write_report(path, title="SIFThinker", facts=FACTS, stages=stages, extra_samples=extra)
    page = Page(path.read_text(encoding="utf-8"))

    assert path.stat().st_size < 3e6
    assert not {"script", "link", "iframe", "img"} & {tag for tag, _ in page.tags}
    for _, attrs in page.tags:
        assert all(
            (value or "")[:1] == "#" or (value or "")[:11] == "data:image/"
            for key, value in attrs.items()
            if key in ("href", "src")
        )
    assert "url(" not in page.text
    assert "@import" not in page.text
    summary = json.loads((runs / "grpo" / "summary.json").read_text())["metrics"]["total_reward"]
    assert {f"{summary['mean']:.2f}", f"[{summary['low']:.2f}, {summary['high']:.2f}]"} <= set(page.texts)
    assert {"SIFThinker", "1 × H200", "Results", "By family", "Photographs", "KL to the reference"} <= set(page.texts)
    assert {"Training: SFT", "Training: SFT + GRPO-SIF"} <= set(page.texts)
    assert sum(tag == "polyline" for tag, _ in page.tags) == 2 * (5 + 9)
    assert {"highest total reward", "lowest total reward", "median of counting"} <= set(page.texts)
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    assert {attrs["href"] for tag, attrs in page.tags if tag == "use"} == {f"#{name}" for name in ids}


def test_a_trace_shows_its_area_the_gold_box_and_the_claimed_beside_the_true_depth(trace_folder):
    steps = [
        Step((BoxDepth((0.0, 0.0, 1.0, 1.0), 0.5),), "Everything."),
        Step((BoxDepth((0.1, 0.2, 0.4, 0.8), 0.26), BoxDepth((0.6, 0.0, 1.0, 1.0), 0.9)), "Two things."),
    ]
    page = report_of(trace_folder, question(render(steps, "left")))
    assert page.rects("area") == [[0, 0, 100, 50], [10, 10, 30, 30], [60, 0, 40, 50]]
    assert page.rects("gold") == [[10, 10, 20, 20]] * 2  # on the image and on the depth map
    assert page.rects("gold thin") == [[10, 10, 20, 20]] * 2  # on each step
    lines = re.findall(r"(?:box \d: )?depth [\d.]+, true [\d.]+ + [✓✗]", page.text)
    assert lines == [
        "depth 0.500, true 0.500  ✓",
        "box 1: depth 0.260, true 0.251  ✓",
        "box 2: depth 0.900, true 0.749  ✗",
    ]
    assert "Violations: " not in page.texts


def write_groups(run: Path, step: int, totals: list[list[float | None]]) -> None:
    """A step of a training: one group per list, the completions named after their group and number."""
    (run / "samples").mkdir(exist_ok=True)
    (run / "metrics.jsonl").write_text('{"step": 0, "kl": 0.1}\n')
    rows = []
    for group, of_group in enumerate(totals):
        for number, total in enumerate(of_group):
            place = {"group": group, "sample": number, "advantage": 0.0 if total is None else total - 1}
            text = render([Step((BoxDepth((0.0, 0.0, 1.0, 1.0), 0.5),), f"step {step} text {group}{number}")], "a")
            row = question(text, image="../image.png", depth_image="../depth.png") | place
            rows.append(row | {"scores": row["scores"] | {"total": total, "answer": total}})
    path = run / "samples" / f"step-{step}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_the_completions_of_a_training_are_shown_by_step_with_their_best_and_worst_traces(trace_folder):
    write_groups(trace_folder, 0, [[1.0, 1.5, 1.0], [0.0, 2.0, None], [1.0, 1.0, 1.0]])
    for step in (4, 9, 14, 19, 24):
        write_groups(trace_folder, step, [[0.5, 3.5, 2.0]])
    stages = [Stage("GRPO", trace_folder / "metrics.jsonl", None)]
    write_report(trace_folder / "report.html", title="T", facts=FACTS, stages=stages)
    page = Page((trace_folder / "report.html").read_text(encoding="utf-8"))
    assert "Completions while training: GRPO" in page.texts
    assert [text for text in page.texts if re.fullmatch(r"step \d+", text)] == [
        "step 0",
        "step 9",
        "step 14",
        "step 24",
    ]
    shown = [text for text in page.texts if re.fullmatch(r"step \d+ text \d\d", text)]
    assert shown[:4] == ["step 0 text 11", "step 0 text 10", "step 0 text 01", "step 0 text 02"]
    assert shown[4:6] == ["step 9 text 01", "step 9 text 00"]
    assert page.texts.count("widest spread of rewards") == 4
    assert page.texts.count("median spread of rewards") == 1
    assert "2, advantage +1.00" in page.texts
    assert "1, advantage −1.00" in page.texts
    assert "3, advantage +0.00" in page.texts  # not judged: a row of dashes, no trace
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(ids) == len(set(ids))


def test_a_group_that_no_judge_scored_is_shown_without_a_trace(trace_folder):
    write_groups(trace_folder, 3, [[None, None]])
    write_report(
        trace_folder / "report.html", title="T", facts={}, stages=[Stage("G", trace_folder / "metrics.jsonl", None)]
    )
    page = Page((trace_folder / "report.html").read_text(encoding="utf-8"))
    assert "step 3" in page.texts
    assert "step 3 text 00" not in page.texts


@pytest.mark.parametrize(("steps", "chosen"), [([], []), ([7], [7]), ([0, 9, 10, 100, 2], [0, 2, 10, 100])])
def test_the_first_and_the_last_step_are_shown_in_order_of_number(steps, chosen):
    assert list(choose_steps([Path(f"samples/step-{step}.jsonl") for step in steps])) == chosen


def test_markup_in_everything_that_a_model_or_a_file_says_stays_text(trace_folder):
    attack = "<script>alert(1)</script><img src=x onerror=alert(1)>\"'"
    completion = render([Step((BoxDepth((0.0, 0.0, 1.0, 1.0), 0.5),), attack)], attack)
    sample = question(completion, id=attack, family=attack, problem=attack, response=attack)
    page = report_of(trace_folder, sample, name=attack)
    assert not {"script", "img"} & {tag for tag, _ in page.tags}
    assert not any(key.startswith("on") for _, attrs in page.tags for key in attrs)
    assert page.text.count(attack) >= 7


def test_a_completion_without_a_trace_is_shown_open_with_its_violations(trace_folder):
    page = report_of(trace_folder, question("I think it is left.", finish_reason="length"))
    assert "I think it is left." in page.texts
    assert ("details", {"open": "open"}) in page.tags
    assert "no answer" in page.texts
    assert any("cut off at the token limit" in text for text in page.texts)


def test_a_depth_that_cannot_be_read_is_said_to_be_unreadable(trace_folder):
    area = '<think><area>[{"bbox_2d":[0,0,1,1],"depth":true}]</area><text>t</text></think><answer>a</answer>'
    assert "depth unreadable, true 0.500" in report_of(trace_folder, question(area)).text


def test_a_question_without_a_depth_map_shows_the_claimed_depth_alone(trace_folder):
    steps = [Step((BoxDepth((0.0, 0.0, 1.0, 1.0), 0.5),), "All.")]
    page = report_of(trace_folder, question(render(steps, "left"), depth_image=None))
    assert "depth 0.500" in page.texts
    assert len(page.rects("gold")) == 1


def test_a_model_that_loops_or_rambles_does_not_fill_the_page(trace_folder):
    box = BoxDepth((0.0, 0.0, 0.5, 0.5), 0.5)
    page = report_of(trace_folder, question(render([Step((box,) * 50, "again " * 500)] * 30, "a" * 9000)))
    assert (trace_folder / "report.html").stat().st_size < 100_000
    assert "and 22 more steps" in page.texts
    assert page.texts.count("and 42 more boxes") == 8


def test_half_a_surrogate_pair_does_not_stop_the_report(trace_folder):
    assert "half ?" in report_of(trace_folder, question("half \ud83d")).text


def test_a_report_that_cannot_be_made_leaves_the_old_one(trace_folder):
    path = trace_folder / "report.html"
    path.write_text("old")
    samples = write_samples(trace_folder, [question("", image="missing.png")])
    with pytest.raises(InputError, match=r"missing\.png"):
        write_report(path, title="T", facts={}, stages=[Stage("SFT", None, samples)])
    with pytest.raises(InputError, match="GRPO"):
        write_report(path, title="T", facts={}, stages=[], extra_samples={"Photographs": {"GRPO": samples}})
    (trace_folder / "summary.json").unlink()
    with pytest.raises(InputError, match=r"summary\.json"):
        write_report(path, title="T", facts={}, stages=[Stage("SFT", None, samples)])
    assert path.read_text() == "old"
    assert not list(trace_folder.glob(".report*"))


def test_statistics_table_and_report_never_import_jax():
    code = "import sys, sif_jax.evals.table, sif_jax.report.page; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env=os.environ, check=False).returncode == 0
