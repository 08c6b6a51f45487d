"""`sif-jax plan`: topologies, configs, formulas, search, advice; programs compiled for TPUs where their compiler is here."""

import importlib.util
import json
import math
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from click.testing import CliRunner
from jax.sharding import AxisType, Mesh, PartitionSpec

from sif_jax.bench.flops import matmul_flops
from sif_jax.bench.workload import abstract_policy, random_batch
from sif_jax.cli import main
from sif_jax.errors import InputError
from sif_jax.ops.attention_backends import self_attention
from sif_jax.parallel.chips import GIB, TPUS
from sif_jax.plan.analytic import estimate, estimated_seconds
from sif_jax.plan.collectives import Traffic
from sif_jax.plan.command import run
from sif_jax.plan.compiled import Compiled, Cost, Memory, _too_large
from sif_jax.plan.model_size import model_size
from sif_jax.plan.plan import Plan, best_plan
from sif_jax.plan.programs import Program
from sif_jax.plan.report import advice, report
from sif_jax.plan.roofline import step_time, times
from sif_jax.plan.search import candidates, overrides, ranked
from sif_jax.plan.setting import Setting, read_architecture, read_config
from sif_jax.plan.tables import tables
from sif_jax.plan.topology import check_compiler, larger, libtpu_of_jax, parse_topology
from sif_jax.training import sft
from tests.architectures import tiny_architecture
from tests.conftest import ROOT

SFT, GRPO = (str(ROOT / "configs" / "paper" / f"{stage}.yaml") for stage in ("sft", "grpo"))
NEEDS_LIBTPU = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="the compiler for TPUs is not installed (libtpu)"
)


def setting(topology="v5e-16", model="7B", words=(SFT,)) -> Setting:
    config = read_config(words)
    name, architecture = read_architecture(model, config)
    return Setting(config, architecture, name, parse_topology(topology))


def size_of(setting: Setting):
    return model_size(setting.architecture, setting.config)


@pytest.mark.parametrize(
    ("text", "name", "devices"),
    [
        ("v5e:4x4", "v5e:4x4", 16),
        ("v5e-16", "v5e:4x4", 16),
        ("v5p:2x2x4", "v5p:2x2x4", 16),
        ("v5p-32", "v5p:2x2x4", 16),  # cores, two per chip
        ("v5p-128", "v5p:4x4x4", 64),
        ("v6e-256", "v6e:16x16", 256),
        ("gpu:h20x8", "gpu:h20x8", 8),
        ("gpu:a100-80x16", "gpu:a100-80x16", 16),
    ],
)
def test_a_topology_is_named_by_its_shape_or_its_size(text, name, devices):
    topology = parse_topology(text)
    assert (topology.name, topology.num_devices) == (name, devices)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("v9:4x4", "unknown TPU; got 'v9:4x4'; expected one of v5e, v5p, v6e"),
        ("v5p:4x4", "wrong shape of a slice; got 'v5p:4x4'; expected 3 numbers"),
        ("v5p-33", "no such slice; got 'v5p-33'"),
        ("v5e-17", "no such slice; got 'v5e-17'"),
        ("gpu:h1x8", "unknown GPU; got 'gpu:h1x8'; expected gpu:CARDxCOUNT with one of h20"),
        ("gpu:h20x12", "no such number of GPUs; got 12"),
        ("cloud", "unknown topology; got 'cloud'; expected v5e:4x4"),
    ],
)
def test_an_unknown_topology_is_one_clear_line(text, says):
    with pytest.raises(InputError, match=r"^.*$") as error:
        parse_topology(text)
    assert str(error.value).startswith(says)


@pytest.mark.parametrize(
    ("words", "options", "says"),
    [
        ([SFT, "mesh.fsdp=3"], {}, "the mesh does not divide the devices"),
        ([SFT], {"topology": "v5e:8x8"}, "rows do not divide over the devices; got 16"),
        ([SFT, "model.path=nowhere"], {"model": None}, "nowhere: no model here"),
        ([SFT], {"model": "8B"}, "8B: no model here; expected 3B, 7B, 32B, 72B"),
        ([], {}, "neither an SFT nor a GRPO config"),
        ([SFT, GRPO], {}, "command line: more than one config"),
        (["nowhere.yaml"], {}, "nowhere.yaml: cannot read this config"),
        ([SFT, "model.attention=cudnn"], {}, "cudnn attention does not run on tpu"),
    ],
)
def test_bad_input_is_one_clear_line(words, options, says):
    given = {"topology": "v5e-16", "model": "7B"} | options
    with pytest.raises(InputError) as error:
        run(words, **given, tries=0, completion_tokens=None, analytic=True, json_only=True)
    assert str(error.value).startswith(says)


def test_the_command_ends_with_exit_code_2_and_the_line_alone():
    result = run_plan(SFT, "--topology", "v5e-17", "--model", "7B")
    assert result.returncode == 2
    assert result.stderr.startswith("error: no such slice; got 'v5e-17'")
    assert result.stderr.count("\n") == 1


def run_plan(*arguments: str) -> subprocess.CompletedProcess:
    """In a process of its own: the command decides which devices jax finds."""
    command = [sys.executable, "-c", "from sif_jax.cli import main; main()", "plan", *arguments]
    return subprocess.run(command, cwd=ROOT, env=os.environ | NO_CACHE, capture_output=True, text=True, check=False)


NO_CACHE = {"JAX_COMPILATION_CACHE_DIR": ""}


def test_a_config_with_keys_of_both_kinds_is_refused():
    with pytest.raises(InputError, match="neither an SFT nor a GRPO config"):
        read_config([SFT, "num_samples=8"])


def test_a_published_name_stands_for_the_architecture_that_is_kept_here():
    config = read_config([SFT])
    assert config.model.path == "Qwen/Qwen2.5-VL-7B-Instruct"
    assert read_architecture(None, config) == read_architecture("7B", config)


def test_a_missing_compiler_is_told_with_the_command_that_installs_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"not installed.*pip install 'sif_jax\[plan\]'"):
        check_compiler(parse_topology("v5e-16"))
    with pytest.raises(InputError, match=r"not installed.*pip install 'sif_jax\[plan-gpu\]'"):
        check_compiler(parse_topology("gpu:h20x8"))


def test_a_compiler_of_another_jax_is_told_with_the_right_one(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr("importlib.metadata.version", lambda name: "0.0.99")
    wanted = re.escape(f"{libtpu_of_jax()}.*")
    with pytest.raises(InputError, match=rf"got '0.0.99'; expected {wanted}; fix: pip install 'libtpu=={wanted}'"):
        check_compiler(parse_topology("v5e-16"))


def test_the_formulas_follow_the_mesh():
    whole = estimate(setting("v5p-32"), size_of(setting()))
    split = setting("v5p-32", words=(SFT, "mesh.fsdp=8", "mesh.tensor=2"))
    parts = estimate(split, size_of(split))
    assert parts.held["frozen weights"] == whole.held["frozen weights"] / 16
    assert parts.needed < whole.needed


@pytest.mark.parametrize("words", [(SFT,), (GRPO, "prompts_per_step=4")])
def test_a_search_changes_neither_the_optimizer_step_nor_the_number_of_devices(words):
    given = setting(words=words)
    tried = list(candidates(given))
    assert len(tried) > 50
    for each in tried:
        config = each.config
        assert np.prod(list(each.mesh.values())) == 16
        if words[0] == SFT:
            assert config.batch_size * config.accumulation == 128
        else:
            assert (config.prompts_per_step, config.num_samples) == (4, 8)
            assert config.prompts_per_step % config.micro_batch == 0


def test_the_words_that_a_search_prints_make_its_config():
    found = ranked(setting(), size_of(setting()))[0]
    again = setting(words=(SFT, *overrides(found).split()))
    assert again.config.model_copy(update={"mesh": found.config.mesh}) == found.config
    assert again.mesh == found.mesh


def test_what_a_search_finds_fits_and_is_ordered_by_time():
    given = setting("v5e-16", "72B")
    found = ranked(given, size_of(given))
    limit = given.topology.chip.hbm_bytes
    assert found
    assert all(estimate(each, size_of(given)).needed <= limit for each in found)
    seconds = [round(estimated_seconds(each, size_of(given)), 3) for each in found]
    assert seconds == sorted(seconds)


def test_where_nothing_fits_a_search_tells_what_lacks_least_and_by_how_much():
    given = setting("v5e:2x2", "72B")
    assert not ranked(given, size_of(given))
    (plan,) = best_plan(given, tries=1, analytic=True)
    least = min(estimate(each, size_of(given)).needed for each in candidates(given))
    assert plan.estimate.needed == least > given.topology.chip.hbm_bytes
    assert "GiB too much. What would:" in report(plan)
    assert "- more chips: " in report(plan)


def test_a_step_that_no_mesh_divides_is_refused():
    words = (SFT, "batch_size=3", "accumulation=1", "data.buckets={tokens: [1001], patches: [2688]}")
    told = "no mesh and micro-batch divide this optimizer step; got '3 rows on 256 devices'"
    with pytest.raises(InputError, match=told):
        best_plan(setting("v6e-256", "3B", words), tries=1, analytic=True)


def made_plan(given: Setting, peak_gib: float) -> Plan:
    """As if one program had been compiled."""
    size = size_of(given)
    cost = Cost(1e12, 1e9, {"all-gather": Traffic(4, 1e9)})
    fits = peak_gib * GIB <= given.topology.chip.hbm_bytes
    program = Program("gradients", None, (), {}, 8, 0.5 * GIB)
    compiled = Compiled(program, Memory(1e9, 1e9, peak_gib * GIB, 0.0), cost if fits else None, 1.0)
    return Plan(given, size, "splash", estimate(given, size), [compiled])


def test_what_does_not_fit_is_told_by_how_much_and_what_would():
    plan = made_plan(setting(words=(SFT, "model.remat=dots")), 20.0)
    text = report(plan)
    assert "Does not fit: 20.50 of 15.75 GiB, 4.75 GiB too much. What would:" in text
    kinds = [line.partition(":")[0] for line in advice(plan)]
    assert "weights split further" in kinds
    assert "more chips" in kinds
    assert json.loads(text.splitlines()[-1])["fits"] is False


def test_what_fits_is_told_with_its_head_room_and_what_bounds_it():
    text = report(made_plan(setting(), 10.0))
    assert "Fits: 10.50 of 15.75 GiB, head-room 5.25 GiB." in text
    figures = json.loads(text.splitlines()[-1])
    assert figures["head_room_bytes"] == pytest.approx(5.25 * GIB)
    assert figures["programs"][0]["bound_by"] == "compute"
    assert figures["programs"][0]["seconds"]["network"] == pytest.approx(1e9 / 200e9)
    assert figures["step"]["seconds"] == pytest.approx(8 * 1e12 / 197e12)


def test_saved_lines_make_a_table_with_a_dash_for_what_a_compiler_that_refused_did_not_say():
    fits, refused = made_plan(setting(), 10.0), made_plan(setting(model="72B"), 20.0)
    unknown = refused.programs[0]._replace(memory=Memory(math.nan, math.nan, 20.0 * GIB, 0.0))
    lines = [json.loads(report(plan).splitlines()[-1]) for plan in (fits, refused._replace(programs=[unknown]))]
    text = tables(lines)
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith(("| 7B", "| 72B"))]
    assert [row[3:5] + row[7:9] for row in rows] == [
        ["10.50", "5.25", "0.0406", "compute"],
        ["20.50", "**-4.75**", "-", "-"],
    ]
    assert (
        "| gradients | 8 | 0.93 | 0.93 | 10.00 | 0.50 | 1 | 0.93 | 0.93 | 5.08 | compute | all-gather 4 (0.93 GiB) |"
        in text
    )
    assert "| gradients | 8 | - | - | 20.00 | 0.50 | - | - | - | - | - | does not fit |" in text


def test_a_program_is_bounded_by_the_longest_of_three_times():
    chip = TPUS["v5p"]
    bound = times(Cost(4.59e12, 2765e9, {"all-reduce": Traffic(1, 6e9), "all-gather": Traffic(2, 6e9)}), chip)
    assert bound == pytest.approx((0.01, 1.0, 0.02))
    assert bound.bound_by == "memory"


def test_a_step_is_the_sum_of_its_programs_each_as_often_as_it_runs():
    chip, memory = TPUS["v5e"], Memory(0.0, 0.0, 0.0, 0.0)
    costs = [(3, Cost(197e12, 0.0, {})), (2, Cost(0.0, 819e9, {}))]
    programs = [Compiled(Program("x", None, (), {}, calls, 0.0), memory, cost, 0.0) for calls, cost in costs]
    assert step_time(programs, chip) == (pytest.approx(5.0), {"compute": 3.0, "memory": 2.0, "network": 0.0})
    assert step_time([Compiled(programs[0].program, memory, None, 0.0)], chip) is None


@pytest.mark.parametrize(
    ("says", "gib"),
    [
        ("Ran out of memory in memory space hbm. Used 23.05G of 15.75G hbm.", 23.05),
        ("the total memory required for HLO temporaries (1.50T) exceeds available HBM (15.75G).", 1536),
    ],
)
def test_a_compiler_that_runs_out_of_memory_says_how_much_it_wanted(says, gib):
    assert _too_large(RuntimeError(f"RESOURCE_EXHAUSTED: {says}")).peak == pytest.approx(gib * GIB)
    with pytest.raises(RuntimeError, match="INTERNAL"):
        _too_large(RuntimeError("INTERNAL: something else"))


def test_larger_slices_of_the_same_chip_are_known():
    assert [topology.name for topology in larger(parse_topology("v5e-64"))] == ["v5e:8x16", "v5e:16x16"]
    assert [topology.name for topology in larger(parse_topology("gpu:h20x64"))] == ["gpu:h20x128", "gpu:h20x256"]


def gradient_step(layers: int):
    graphdef, trainable, frozen = abstract_policy(tiny_architecture(layers=layers))
    batch = random_batch(tiny_architecture(layers=layers), rows=1, tokens=64, image_px=(56, 56))
    key = jax.eval_shape(lambda: jax.random.key(0))
    return sft.make_gradients(graphdef, dropout=False).trace(None, trainable, frozen, batch, key)


def test_the_flops_of_a_layer_are_those_that_xla_counts_where_layers_are_written_out():
    """Four more layers: what is a loop in both programs, and counted once by XLA, cancels. XLA counts elementwise work, too."""
    four, eight = (gradient_step(layers) for layers in (4, 8))
    ours = matmul_flops(eight.jaxpr.jaxpr) - matmul_flops(four.jaxpr.jaxpr)
    theirs = [traced.lower().compile().cost_analysis()["flops"] for traced in (four, eight)]
    assert ours / (theirs[1] - theirs[0]) == pytest.approx(1.0, abs=0.25)


def test_flops_count_the_devices_of_a_shard_map_and_the_cells_of_a_kernel():
    mesh = Mesh(np.array(jax.devices()[:1]), ("x",), axis_types=(AxisType.Auto,))
    everywhere = jax.shard_map(lambda x: x @ x, mesh=mesh, in_specs=PartitionSpec(), out_specs=PartitionSpec())
    assert matmul_flops(jax.make_jaxpr(everywhere)(jnp.ones((8, 8))).jaxpr) == 2 * 8**3
    batch, length, heads, dim = 2, 1024, 2, 128
    q = jnp.zeros((batch, length, heads, dim), jnp.bfloat16)
    k = jnp.zeros((batch, heads, length, dim), jnp.bfloat16)
    segments = jnp.ones((batch, length), jnp.int32)

    def attend(q, k):
        return self_attention(q, k, k, segments, causal=False, backend="splash")

    attention = 4 * batch * heads * length**2 * dim
    assert matmul_flops(jax.make_jaxpr(attend)(q, k).jaxpr) == attention


def test_the_formulas_alone_answer_without_a_compiler():
    result = run_plan(GRPO, "--topology", "gpu:h20x8", "--model", "7B", "--analytic", "--json")
    assert result.returncode == 0, result.stderr
    figures = json.loads(result.stdout)
    assert figures["by"] == "formulas"
    assert figures["devices"] == 8
    assert figures["programs"] == []
    assert 0 < figures["needed_bytes"] < 95 * GIB


def test_the_command_says_how_it_is_used():
    text = CliRunner().invoke(main, ["plan", "--help"]).output
    assert "sif-jax plan configs/paper/sft.yaml --topology v5e-16 --model 7B" in text


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory):
    """A directory that says the shapes of a small model; both stacks are short, so that they compile fast."""
    directory = tmp_path_factory.mktemp("tiny")
    text = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 2, "num_key_value_heads": 2}
    rope = {"type": "mrope", "mrope_section": [16, 24, 24]}
    vision = {"hidden_size": 160, "intermediate_size": 320, "num_heads": 2, "out_hidden_size": 256}
    special = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    config = {
        "model_type": "qwen2_5_vl",
        **text,
        **{name: 1000 + number for number, name in enumerate(special)},
        "vocab_size": 1024,
        "num_hidden_layers": 2,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "rope_scaling": rope,
        "vision_config": vision | {"depth": 1, "fullatt_block_indexes": [0]},
    }
    (directory / "config.json").write_text(json.dumps(config))
    return str(directory)


SMALL = ("data.buckets.tokens=[128]", "data.buckets.patches=[64]", "model.max_pixels=6272")


def plan_for_four_tpus(*words: str, model: str) -> dict:
    result = run_plan(*words, "--topology", "v5e:2x2", "--model", model, "--json")
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@NEEDS_LIBTPU
def test_every_program_of_sft_compiles_for_four_tpus(tiny_model):
    words = (SFT, *SMALL, "batch_size=4", "accumulation=2", "mesh.fsdp=2", "mesh.tensor=2")
    figures = plan_for_four_tpus(*words, model=tiny_model)
    gradients, optimizer = figures["programs"]
    assert (gradients["name"], gradients["runs"], optimizer["name"]) == ("gradients", 2, "optimizer")
    assert gradients["collectives"]["all-gather"]["bytes"] > 0  # weights, which fsdp splits
    assert gradients["collectives"]["all-reduce"]["bytes"] > 0  # sums over tensor
    assert 0 < gradients["argument_bytes"] < gradients["peak_bytes"] < figures["needed_bytes"] < GIB
    assert figures["head_room_bytes"] == figures["limit_bytes"] - figures["needed_bytes"]


@NEEDS_LIBTPU
@pytest.mark.slow
def test_every_program_of_grpo_compiles_for_four_tpus(tiny_model):
    words = (GRPO, *SMALL, "max_new_tokens=128", "mesh.data=2", "mesh.tensor=2")
    names = [program["name"] for program in plan_for_four_tpus(*words, model=tiny_model)["programs"]]
    assert names == ["images", "prompts", "decoding", "longer ring", "reference", "gradients", "optimizer"]


@NEEDS_LIBTPU
@pytest.mark.slow
def test_layers_that_are_apart_from_the_start_are_not_copied_for_the_rollout(tiny_model):
    words = (GRPO, *SMALL, "max_new_tokens=64", "lora.rank=2", "model.scan_layers=false")
    programs = {program["name"]: program for program in plan_for_four_tpus(*words, model=tiny_model)["programs"]}
    assert list(programs) == ["images", "layers apart", "prompts", "decoding", "reference", "gradients", "optimizer"]
    before, after = (programs[name]["beside_bytes"] for name in ("layers apart", "prompts"))
    copied = programs["layers apart"]["argument_bytes"]
    assert 0 < copied < 0.05 * programs["decoding"]["argument_bytes"], "adapters alone"
    assert after - before < 2 * copied


@NEEDS_LIBTPU
@pytest.mark.slow
def test_a_program_that_does_not_fit_a_tpu_is_told_and_what_would(tiny_model):
    words = (SFT, "data.buckets.tokens=[65536]", "data.buckets.patches=[64]", "model.max_pixels=6272", "batch_size=256")
    result = run_plan(*words, "accumulation=1", "model.remat=none", "--topology", "v5e:2x2", "--model", tiny_model)
    assert result.returncode == 1, result.stderr
    assert "Does not fit: " in result.stdout
    assert "fewer rows at a time: " in result.stdout
