"""What `sif-jax export` writes, from runs and from files, and the pixel limits that travel with a checkpoint."""

import json
import shutil
from copy import deepcopy

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from peft import PeftModel
from safetensors.numpy import load_file
from transformers import Qwen2_5_VLForConditionalGeneration

import sif_jax
from sif_jax.cli import main
from sif_jax.config import GrpoConfig, SftConfig
from sif_jax.errors import InputError
from sif_jax.models.qwen2_5_vl.image_processor import recorded_pixels
from sif_jax.training import grpo, sft
from tests.checkpoints import torch_model
from tests.test_model_parity import MESSAGES, torch_inputs
from tests.tiny_run import assert_same_weights, tiny_config, tiny_files

pytestmark = pytest.mark.xdist_group("export")  # its fixtures are slow: made once, not by each worker

LORA = ["lora={rank: 4, alpha: 8}", "freeze_vision=false", "optimizer.learning_rate=1.0e-2"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Four steps with checkpoints at the second and the fourth."""
    root = tmp_path_factory.mktemp("lora")
    return sft.train(tiny_config(SftConfig, root, *LORA, "max_steps=4", "run.save_every=2"))


def export(*words: object) -> str:
    result = CliRunner().invoke(main, ["export", *map(str, words)])
    assert result.exit_code == 0, result.output
    return result.stdout.strip()


def refused(*words: object) -> str:
    result = CliRunner().invoke(main, ["export", *map(str, words)])
    assert result.exit_code == 2, result.output
    return result.stderr


def logits(vlm, name="two images"):
    return vlm.logits(vlm.encode(MESSAGES[name]))


def test_a_run_is_exported_merged_as_it_was_at_its_end(run, tmp_path):
    assert export(f"path={run}", f"out={tmp_path}/model") == f"{tmp_path}/model"
    assert_same_weights(tmp_path / "model", run)


def test_an_earlier_step_is_another_model(run, tmp_path):
    export(f"path={run}", f"out={tmp_path}/two", "step=2")
    now, then = (logits(sif_jax.load(path)) for path in (run, tmp_path / "two"))
    assert np.abs(now - then).max() > 1e-3
    assert "one of the saved steps [2, 4]" in refused(f"path={run}", f"out={tmp_path}/three", "step=3")


def relative(ours, theirs) -> float:
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


# transformers 5 renames a property that PEFT still reads.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_the_adapter_of_a_run_is_what_peft_reads_and_its_base_is_found_again(run, tmp_path, measured):
    export(f"path={run}", f"out={tmp_path}/adapter", "format=adapter")
    vlm = sif_jax.load(tmp_path / "adapter")
    assert vlm.source == tiny_files() / "model"
    base = deepcopy(torch_model(tiny_files() / "model"))
    peft = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    inputs = torch_inputs(vlm.encode(MESSAGES["two images"]))
    inputs["mm_token_type_ids"] = (inputs["input_ids"] == base.config.image_token_id).int()
    with torch.no_grad():
        theirs = peft(**inputs).logits[0].numpy()
    measured("logits of a run's exported adapter under peft.PeftModel", relative(logits(vlm), theirs), at_most=1e-4)
    measured("logits of adapter and merged model", relative(logits(vlm), logits(sif_jax.load(run))), at_most=1e-4)
    assert np.abs(logits(vlm) - logits(sif_jax.load(vlm.source))).max() > 1e-2


def test_a_checkpoint_and_an_adapter_become_one_model_and_the_adapter_comes_back_bit_for_bit(run, tmp_path):
    export(f"path={tiny_files()}/model", f"adapter={run}/adapter", f"out={tmp_path}/merged")
    merged, expected = (load_file(path / "model.safetensors") for path in (tmp_path / "merged", run / "model"))
    for name, value in expected.items():
        np.testing.assert_allclose(merged[name], value, atol=1e-6, err_msg=name)
    export(f"path={run}/adapter", f"out={tmp_path}/again", "format=adapter")
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "again" / file).read_bytes() == (run / "adapter" / file).read_bytes()


def test_a_checkpoint_exported_as_it_is_has_the_same_bits_and_another_dtype_is_named_in_its_config(tmp_path):
    source = tiny_files() / "model"
    export(f"path={source}", f"out={tmp_path}/model")
    assert_same_weights(tmp_path / "model", source)
    export(f"path={source}", f"out={tmp_path}/half", "dtype=bfloat16")
    assert json.loads((tmp_path / "half" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    theirs = Qwen2_5_VLForConditionalGeneration.from_pretrained(tmp_path / "half", dtype="auto")
    assert theirs.dtype == torch.bfloat16


def test_the_api_saves_an_adapter_as_an_adapter_and_merged_as_a_model(run, tmp_path, measured):
    vlm = sif_jax.load(tiny_files() / "model", adapter=run)
    vlm.save_pretrained(tmp_path / "adapter")
    assert {path.name for path in (tmp_path / "adapter").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    vlm.merged().save_pretrained(tmp_path / "merged")
    np.testing.assert_array_equal(logits(sif_jax.load(tmp_path / "merged")), logits(vlm.merged()))
    measured("logits before and after merging", relative(logits(vlm.merged()), logits(vlm)), at_most=1e-4)


def test_a_run_may_start_from_an_adapter_which_is_then_part_of_its_base(run, tmp_path):
    start = [f"model.path={tiny_files()}/model", f"model.adapter={run}", "lora={rank: 2}"]
    second = grpo.train(tiny_config(GrpoConfig, tmp_path, *start, "max_steps=1", "optimizer.learning_rate=1.0e-9"))
    now, then = load_file(second / "model" / "model.safetensors"), load_file(run / "model" / "model.safetensors")
    for name, value in then.items():
        np.testing.assert_allclose(now[name], value, atol=1e-5, err_msg=name)
    assert not (second / "adapter").exists()
    assert "the base of this adapter is nowhere on disk" in refused(
        f"path={second}", f"out={tmp_path}/out", "format=adapter"
    )


def test_the_pixel_limits_of_a_training_hold_for_all_that_follows(run):
    recorded = recorded_pixels(run / "model")
    assert recorded == recorded_pixels(run / "adapter")
    assert recorded_pixels(tiny_files() / "model") is None, "a default of the published files binds nobody"
    assert sif_jax.load(run).processor.image_processor.max_pixels == recorded["max_pixels"]
    sif_jax.load(run, max_pixels=recorded["max_pixels"])
    for path in (run, run / "adapter"):
        with pytest.raises(InputError, match=r"another max_pixels; got 3136; .*fix: leave model.max_pixels out"):
            sif_jax.load(path, max_pixels=3136)
        assert sif_jax.load(path, max_pixels=3136, other_pixels=True).processor.image_processor.max_pixels == 3136


def test_what_cannot_be_exported_is_refused_in_one_line_and_leaves_nothing(run, tmp_path):
    full = sft.train(tiny_config(SftConfig, tmp_path / "full", "max_steps=1"))
    lost = shutil.copytree(run / "adapter", tmp_path / "lost")
    config = json.loads((lost / "adapter_config.json").read_text())
    (lost / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "gone/model"}))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.yaml").write_text("run: {name: eval}\n")
    out, model = f"out={tmp_path}/out", f"path={tiny_files()}/model"
    before = {path.name for path in tmp_path.iterdir()}
    for words, line in [
        ((f"path={run}", f"out={lost}"), "already exists"),
        ((f"path={run}", out, f"adapter={lost}"), "a run has its own adapter"),
        ((f"path={full}", out, "format=adapter"), "the model has no adapter to save"),
        ((model, out, "format=adapter"), "the model has no adapter to save"),
        ((model, out, "step=3"), "not a run"),
        ((f"path={lost}", out), "the base of this adapter is not here"),
        ((f"path={run}/adapter", out, f"adapter={lost}"), "two adapters"),
        ((f"path={tmp_path}/other", out), "not a training run"),
        ((f"path={tmp_path}/none", out), "no model here"),
    ]:
        message = refused(*words)
        assert message.startswith("error: "), message
        assert line in message
        assert len(message.splitlines()) == 1
    assert {path.name for path in tmp_path.iterdir()} == before
