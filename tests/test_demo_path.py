"""The demo's whole path, in miniature: scenes, model, SFT, GRPO-SIF, evaluations, table and report."""

import pytest
import yaml

from sif_jax import demo
from sif_jax.config import DemoConfig, load_config
from sif_jax.training.metrics import read_metrics
from tests.conftest import ROOT
from tests.tiny_run import DEMO, MAX_PIXELS, PATCHES


@pytest.fixture
def config(tmp_path) -> DemoConfig:
    """The demo's own configs, cut to a few steps."""
    changes = {
        "sft": {"max_steps": 3, "batch_size": 4},
        "grpo": {"max_steps": 1, "prompts_per_step": 2, "micro_batch": 2, "num_samples": 2, "max_new_tokens": 8},
        "eval": {"max_new_tokens": 8, "batch_size": 8},
    }
    for stage, changed in changes.items():
        values = yaml.safe_load((ROOT / f"configs/demo/{stage}.yaml").read_text()) | changed
        values["model"]["max_pixels"] = MAX_PIXELS
        values["data"]["buckets"] = {"tokens": [192], "patches": [PATCHES]}
        (tmp_path / f"{stage}.yaml").write_text(yaml.safe_dump(values))
    stages = [f"{stage}={tmp_path / stage}.yaml" for stage in changes]
    return load_config(DemoConfig, None, [*DEMO, *stages, f"root={tmp_path / 'demo'}"])


def test_the_demo_ends_with_a_report_and_a_second_run_trains_nothing_again(config, capsys):
    pytest.importorskip("skimage", reason="the photographs come with scikit-image")
    report = demo.run(config)
    root = report.parent
    assert "<html" in report.read_text()[:300].lower()
    table = (root / "table.md").read_text()
    assert [name for name in demo.STAGES if name in table] == list(demo.STAGES)
    assert (len(read_metrics(root / "sft")), len(read_metrics(root / "grpo"))) == (3, 1)
    assert len(list(root.glob("eval-*/samples.jsonl"))) == 5
    assert "SFT + GRPO-SIF" in capsys.readouterr().out

    metrics = {stage: (root / stage / "metrics.jsonl").read_text() for stage in ("sft", "grpo")}
    assert demo.run(config) == report
    assert (root / "table.md").read_text() == table
    assert metrics == {stage: (root / stage / "metrics.jsonl").read_text() for stage in ("sft", "grpo")}
