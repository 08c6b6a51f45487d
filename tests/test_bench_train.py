"""The training bench: both engines take the same step, its FLOPs are the program's, and what it prints and refuses."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from click.testing import CliRunner

from sif_jax.bench.flops import matmul_flops
from sif_jax.bench.train_flops import step_flops, vision_flops
from sif_jax.bench.train_ours import OurTraining, write_inputs
from sif_jax.bench.train_transformers import TransformersTraining
from sif_jax.bench.train_workload import make_work
from sif_jax.bench.worker import Worker
from sif_jax.bench.workload import abstract_policy
from sif_jax.cli import main
from sif_jax.config import TrainBenchConfig, load_config
from sif_jax.errors import InputError
from sif_jax.models.qwen2_5_vl.config import Qwen2_5_VLConfig
from sif_jax.training.sft import make_gradients
from tests.checkpoints import tiny_checkpoint
from tests.worker_faults import die, fail

SIZES = {
    "image_px": (56, 56),
    "rows": 2,
    "tokens": 48,
    "prompts": 2,
    "samples": 3,
    "prompt_tokens": 24,
    "min_new_tokens": 3,
    "max_new_tokens": 8,
    "lora_rank": 2,
    "steps": 1,
}


@pytest.fixture(scope="module")
def config() -> TrainBenchConfig:
    return TrainBenchConfig(architecture=str(tiny_checkpoint()), **SIZES)


@pytest.fixture(scope="module")
def files(config, tmp_path_factory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("bench")
    write_inputs(config, root / "model", root / "adapter")
    return root / "model", root / "adapter"


@pytest.mark.parametrize(
    ("stage", "changes"),
    [
        ("sft", {}),
        ("sft", {"rows": 4, "min_tokens": 16}),
        ("grpo", {"micro_batch": 1, "hf_rows": 2, "remat": "dots"}),
    ],
)
def test_both_engines_take_the_same_steps(config, files, stage, changes):
    """Loss and gradient norm, which is that of both factors of every layer, of two steps: the second follows an update."""
    config = config.model_copy(update=changes)
    ours, theirs = (make(config, *files, stage) for make in (OurTraining, TransformersTraining))
    for _ in range(2):
        own, other = ours.step(), theirs.step()
        assert own.loss == pytest.approx(other.loss, rel=1e-4, abs=1e-6)
        assert own.grad_norm == pytest.approx(other.grad_norm, rel=1e-4)
    assert ours.figures()["peak_bytes"] > 0


def test_the_flops_are_those_of_the_traced_program(config):
    """Which also fills up the tower's windows and the head's last chunk."""
    architecture = Qwen2_5_VLConfig.from_directory(tiny_checkpoint())
    work = make_work(config, architecture, "sft")
    graphdef, trainable, frozen = abstract_policy(architecture, lora_rank=config.lora_rank)
    traced = make_gradients(graphdef, dropout=False).trace(None, trainable, frozen, work.batch, jax.random.key(0))
    traced_flops = matmul_flops(traced.jaxpr.jaxpr)
    expected = step_flops(architecture, work, rank=config.lora_rank)
    assert vision_flops(architecture, work) < 0.5 * expected
    assert traced_flops == pytest.approx(expected, rel=0.05)


def test_examples_of_unequal_length_are_packed_for_us_and_padded_for_them(config):
    config = config.model_copy(update={"rows": 4, "min_tokens": 16})
    work = make_work(config, Qwen2_5_VLConfig.from_directory(tiny_checkpoint()), "sft")
    assert work.packed is not None
    padded, packed = work.batch["segments"], work.packed["segments"]
    assert sorted((padded > 0).sum(-1)) == [16, 27, 37, 48]
    assert (packed.shape, packed.max()) == ((3, 48), 2)
    assert work.tokens == (packed > 0).sum() == 16 + 27 + 37 + 48
    for name in ("loss_mask", "patches"):
        assert work.batch[name].sum() == pytest.approx(work.packed[name].sum(), rel=1e-5)


def test_grpo_counts_real_tokens_once_and_the_prompts_once_per_group(config):
    architecture = Qwen2_5_VLConfig.from_directory(tiny_checkpoint())
    work = make_work(config, architecture, "grpo")
    assert work.completed is not None
    assert work.tokens == sum(range(3, 9))
    more = work._replace(completed=work.completed._replace(mask=np.ones_like(work.completed.mask)))
    few, many = (step_flops(architecture, each, rank=2) - vision_flops(architecture, work) for each in (work, more))
    seen = config.prompts * config.prompt_tokens
    assert many / few == pytest.approx((seen + 6 * 8) / (seen + 33), rel=0.1)


def test_the_command_prints_a_table_and_a_line_of_json(config):
    words = [f"{key}={json.dumps(value)}" for key, value in SIZES.items()]
    words += [f"architecture={tiny_checkpoint()}", 'stages=["sft"]']
    result = CliRunner().invoke(main, ["bench", "train", *words])
    assert result.exit_code == 0, result.output
    lines = result.stdout.strip().splitlines()
    figures = json.loads(lines[-1])
    assert {"bench", "machine", "config", "stages"} == set(figures)
    own = figures["stages"]["sft"]["engines"]["sif_jax"]
    assert own["tokens_per_second"] == pytest.approx(2 * 48 / own["seconds"])
    assert own["mfu"] == pytest.approx(figures["stages"]["sft"]["flops"] / own["seconds"] / own["peak_flops"])
    assert 0 < own["seconds"] < own["warm_first_step_seconds"] < own["first_step_seconds"]
    assert any(line.startswith("| sft | sif_jax |") for line in lines)


def test_what_goes_wrong_in_a_worker_is_one_error_here():
    with Worker("mine") as worker, pytest.raises(InputError, match=r"^no such thing; got 3$"):
        worker.run(fail)
    with Worker("mine") as worker, pytest.raises(InputError, match="the process of mine died"):
        worker.run(die)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["micro_batch=3"], "micro_batch leaves a rest; got 3; expected a divisor of 2"),
        (["hf_rows=5"], "hf_rows leaves a rest; got 5; expected a divisor of 16"),
        (["min_tokens=1025"], "min_tokens is above tokens; got 1025; expected at most 1024"),
        (["min_new_tokens=300"], "min_new_tokens is above max_new_tokens; got 300; expected at most 256"),
    ],
)
def test_sizes_that_cannot_be_are_refused(words, message):
    with pytest.raises(InputError, match=message):
        load_config(TrainBenchConfig, None, words)
