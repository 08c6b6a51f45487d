"""Grids of variants: what is shared, what is run, what is not run again, and the table."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from sif_jax import ablation
from sif_jax.ablation import describe_plan, paired_differences, plan, run
from sif_jax.cli import main
from sif_jax.config import AblationConfig, EvalConfig, GrpoConfig, SftConfig, config_text, dump_config, load_config
from sif_jax.errors import InputError
from sif_jax.evals.statistics import summarise
from sif_jax.report.samples import read_groups
from sif_jax.training.metrics import read_metrics
from sif_jax.training.run_dir import open_run
from tests.conftest import ROOT
from tests.report_runs import write_evaluation
from tests.tiny_run import FILES, tiny_config

pytestmark = pytest.mark.xdist_group("ablation")  # its fixtures are slow: made once, not by each worker

STEPS = {SftConfig: ["max_steps=2"], GrpoConfig: ["max_steps=1"], EvalConfig: ["data.limit=6"]}
VARIANTS = """{
  full: {},
  vqa-sft: {sft: [target=answer], grpo: null, eval: [target=answer]},
  cot-sft: {grpo: null},
  no-bbox: {grpo: [rewards.bbox=0]},
  no-depth-input: {all: [prompt.depth_input=false]},
}"""


def grid(root: Path, variants: str = VARIANTS, *words: str) -> AblationConfig:
    """A grid whose stages are the tiny ones of the tests."""
    root.mkdir(parents=True, exist_ok=True)
    stages = []
    for kind, steps in STEPS.items():
        path = root / f"{FILES[kind]}.yaml"
        path.write_text(config_text(tiny_config(kind, root, *steps)))
        stages.append(f"{FILES[kind]}=[{path}]")
    return load_config(AblationConfig, None, [f"root={root / 'grid'}", *stages, f"variants={variants}", *words])


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> AblationConfig:
    config = grid(tmp_path_factory.mktemp("ablation"), "{full: {}, cot-sft: {grpo: null}}")
    run(config)
    return config


@pytest.fixture
def trained(monkeypatch) -> list[str]:
    """The runs that are trained or evaluated from here on."""
    names = []
    for stage, function in ((ablation.sft, "train"), (ablation.grpo, "train"), (ablation, "evaluate")):
        original = getattr(stage, function)
        monkeypatch.setattr(stage, function, lambda c, original=original: names.append(c.run.name) or original(c))
    return names


def test_trainings_that_are_the_same_are_shared_and_each_stage_starts_from_the_one_before(tmp_path):
    runs, root = plan(grid(tmp_path)), tmp_path / "grid"
    named = {name: [stage and stage.run.name for stage in vars(variant).values()] for name, variant in runs.items()}
    assert named == {
        "full": ["sft-full", "grpo-full", "eval-full"],
        "vqa-sft": ["sft-vqa-sft", None, "eval-vqa-sft"],
        "cot-sft": ["sft-full", None, "eval-cot-sft"],
        "no-bbox": ["sft-full", "grpo-no-bbox", "eval-no-bbox"],
        "no-depth-input": ["sft-no-depth-input", "grpo-no-depth-input", "eval-no-depth-input"],
    }
    started = {name: (v.grpo and v.grpo.model.path, v.eval.model.path) for name, v in runs.items()}
    assert started["no-bbox"] == (str(root / "sft-full"), str(root / "grpo-no-bbox"))
    assert started["cot-sft"] == (None, str(root / "sft-full"))
    assert {stage.prompt.depth_input for stage in vars(runs["no-depth-input"]).values()} == {False}
    assert runs["no-bbox"].grpo
    assert runs["no-bbox"].grpo.rewards.weights == {"format": 1, "answer": 1, "bbox": 0, "depth": 1}


def test_a_variant_without_training_is_the_base_model_and_one_without_sft_reinforces_it(tmp_path):
    runs = plan(grid(tmp_path, "{base: {sft: null, grpo: null}, only-grpo: {sft: null}}"))
    base = tiny_config(SftConfig, tmp_path).model.path
    assert runs["base"].eval.model.path == base
    assert runs["only-grpo"].grpo
    assert runs["only-grpo"].grpo.model.path == base


def test_a_finished_grid_has_a_table_of_means_and_of_paired_differences(finished):
    root = Path(finished.root)
    table, rows = (root / "table.md").read_text(), json.loads((root / "table.json").read_text())
    assert "| variant | n | format rate |" in table
    assert "Difference from full, question by question:" in table
    cell = r"-?[\d.]+ \[-?[\d.]+, -?[\d.]+\]"
    assert re.findall(rf"^\| ([a-z-]+) \| 6 \| {cell} \|", table, re.MULTILINE) == ["full", "cot-sft", "cot-sft"]
    assert rows["baseline"] == "full"
    assert (rows["variants"]["full"]["difference"], rows["variants"]["cot-sft"]["grpo"]) == (None, None)
    full, other = (rows["variants"][name]["metrics"]["total_reward"]["mean"] for name in ("full", "cot-sft"))
    assert rows["variants"]["cot-sft"]["difference"]["total_reward"]["mean"] == pytest.approx(other - full)
    assert len(read_metrics(root / "sft-full")) == 2
    assert len(read_groups(root / "grpo-full" / "samples" / "step-0.jsonl")) == 4
    assert not (root / "sft-cot-sft").exists()


def test_nothing_that_is_finished_is_run_again(finished, trained):
    table = (Path(finished.root) / "table.md").read_bytes()
    run(finished)
    assert trained == []
    assert (Path(finished.root) / "table.md").read_bytes() == table
    assert "full     sft-full (finished) → grpo-full (finished) → eval-full (finished)" in describe_plan(finished)


def test_a_grid_that_was_stopped_goes_on_where_it_was(tmp_path, monkeypatch):
    done = []

    def train(config):
        done.append(config.run.name)
        (open_run(config) / "model").mkdir()

    def evaluate(config):
        if len(done) == 2:
            done.append("kill")
            raise KeyboardInterrupt
        done.append(config.run.name)
        write_evaluation(config.run.directory, 2, 0.5)
        dump_config(config, config.run.directory / "config.yaml")

    monkeypatch.setattr(ablation.sft, "train", train)
    monkeypatch.setattr(ablation.grpo, "train", train)
    monkeypatch.setattr(ablation, "evaluate", evaluate)
    config = grid(tmp_path, "{full: {}, base: {sft: null, grpo: null}}")
    with pytest.raises(KeyboardInterrupt):
        run(config)
    assert describe_plan(config).startswith("full  sft-full (finished) → grpo-full (finished) → eval-full (new)")
    run(config)
    assert done == ["sft-full", "grpo-full", "kill", "eval-full", "eval-base"]


def test_an_evaluation_is_repeated_when_its_config_or_its_model_has_changed(finished, trained, tmp_path):
    changed = finished.model_copy(update={"eval": (*finished.eval, "run.seed=1")})
    run(changed)
    assert trained == ["eval-full", "eval-cot-sft"]
    trained.clear()
    run(changed)
    assert trained == []
    (Path(finished.root) / "grpo-full" / "model" / "touched").touch()
    run(changed)
    assert trained == ["eval-full"]


def test_a_finished_run_with_another_config_is_refused(finished):
    changed = finished.model_copy(update={"sft": (*finished.sft, "optimizer.learning_rate=1")})
    with pytest.raises(InputError, match=r"started with another optimizer\.learning_rate"):
        run(changed)


@pytest.mark.parametrize(
    ("variants", "message"),
    [
        ("{a: {eval: [data.limit=2]}, b: {}}", "evaluated on different records"),
        ("{a: {grpo: [data.path=nowhere.json]}}", "nowhere.json: no such records file"),
        ("{a: {grpo: [rewards.bboxes=0]}}", "did you mean rewards.bbox"),
        ("{a b: {}}", "not a directory name"),
    ],
)
def test_a_grid_that_could_not_end_is_refused_before_anything_runs(tmp_path, variants, message):
    with pytest.raises(InputError, match=re.escape(message)):
        plan(grid(tmp_path, variants))
    assert not (tmp_path / "grid").exists()


def sample(number: int, total: float | None) -> dict:
    terms = ("format", "answer", "bbox", "depth", "hiou_last", "hiou_gain", "depth_consistency")
    scores = dict.fromkeys(terms, 0.5) | {"total": total}
    return {"id": str(number), "scene": f"s{number}", "family": "f", "scores": scores, "judge": 0.5}


def by_id(totals: list[float | None]) -> dict[str, dict]:
    return {str(number): sample(number, total) for number, total in enumerate(totals)}


def test_a_difference_that_is_the_same_for_every_question_has_no_width():
    baseline = by_id([0.0, 1.0, 3.0])
    gain = summarise(paired_differences(by_id([0.5, 1.5, 3.5]), baseline), seed=0).metrics["total_reward"]
    assert (gain.mean, gain.low, gain.high, gain.questions) == (0.5, 0.5, 0.5, 3)


@settings(deadline=None, max_examples=25)
@given(st.lists(st.tuples(st.floats(-4, 4), st.floats(-4, 4)), min_size=1, max_size=8))
def test_differences_are_those_of_the_means_and_change_sign_with_the_baseline(pairs):
    ours, theirs = (by_id(list(totals)) for totals in zip(*pairs))
    forth = summarise(paired_differences(ours, theirs), seed=0).metrics["total_reward"]
    back = summarise(paired_differences(theirs, ours), seed=0).metrics["total_reward"]
    assert forth.mean == pytest.approx(np.mean([ours - theirs for ours, theirs in pairs]), abs=1e-12)
    assert (forth.mean, forth.low) == pytest.approx((-back.mean, -back.high), abs=1e-9)


def test_a_question_that_one_variant_cannot_measure_is_left_out():
    gain = summarise(paired_differences(by_id([1.0, None, 2.0]), by_id([0.0, 0.0, None])), seed=0)
    assert gain.metrics["total_reward"].questions == 1


def test_variants_that_answered_different_questions_are_refused():
    with pytest.raises(InputError, match="answered different questions; got \\['2'\\]"):
        paired_differences(by_id([1.0, 1.0]), by_id([1.0, 1.0, 1.0]))


def test_the_papers_grid_has_one_variant_per_claim_and_three_fine_tunings(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(Path, "is_file", lambda _: True)  # the data is not here
    runs = plan(load_config(AblationConfig, "configs/ablation/paper.yaml"))
    assert list(runs)[:3] == ["full", "vqa-sft", "cot-sft"]
    assert {variant.sft and variant.sft.run.name for variant in runs.values()} == {
        "sft-full",
        "sft-vqa-sft",
        "sft-no-depth-input",
    }
    switched = {name: variant.grpo.rewards for name, variant in runs.items() if variant.grpo}
    for term in ("format", "answer", "bbox", "depth"):
        weights = switched[f"no-{term}-reward"].weights
        assert weights == switched["full"].weights | {term: 0}
    assert [switched[f"no-{name}"].answer_progress for name in ("answer-progress", "bbox-progress", "progress")] == [
        False,
        True,
        False,
    ]
    assert len(switched) == 9


def test_a_dry_run_lists_the_demos_grid_and_runs_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(Path, "is_file", lambda _: True)  # the demo may not have been run here
    shown = CliRunner().invoke(main, ["ablate", "configs/ablation/demo.yaml", f"root={tmp_path / 'grid'}", "--dry-run"])
    assert shown.exit_code == 0, shown.output
    assert (
        "no-depth-input  sft-no-depth-input (new) → grpo-no-depth-input (new) → eval-no-depth-input (new)"
        in shown.output
    )
    assert len(shown.output.splitlines()) == 6
    assert not (tmp_path / "grid").exists()
