"""The bench commands on very small sizes: what they print, what their JSON says, what they refuse."""

import json

import jax
import jax.numpy as jnp
import pytest
from click.testing import CliRunner

from sif_jax.bench.flops import matmul_flops
from sif_jax.cli import main
from tests.checkpoints import tiny_checkpoint
from tests.tiny_run import MAX_PIXELS, tiny_files

MACHINE = {"device", "machine", "cores", "jax", "date", "commit"}
SMALL = ["tokens=64", "image_px=[56,56]", "steps=1", "lora_rank=2"]


@pytest.fixture(scope="module")
def architecture(tmp_path_factory) -> str:
    """A config.json of one decoder layer and one vision block, and nothing beside it."""
    raw = json.loads((tiny_checkpoint() / "config.json").read_text())
    raw["text_config"] |= {"num_hidden_layers": 1, "layer_types": ["full_attention"]}
    raw["vision_config"] |= {"depth": 1, "fullatt_block_indexes": [0]}
    directory = tmp_path_factory.mktemp("architecture")
    (directory / "config.json").write_text(json.dumps(raw))
    return f"architecture={directory}"


def invoke(*arguments: str):
    return CliRunner().invoke(main, ["bench", *arguments])


def figures_of(*arguments: str) -> tuple[dict, list[str]]:
    result = invoke(*arguments)
    assert result.exit_code == 0, result.output
    lines = result.stdout.strip().splitlines()
    return json.loads(lines[-1]), lines


def test_remat_prints_a_table_the_machine_and_a_line_of_json(architecture):
    figures, lines = figures_of("remat", architecture, *SMALL)
    assert {"bench", "machine", "config", "policies", "ratios"} == set(figures)
    assert set(figures["machine"]) == MACHINE
    for policy in ("none", "dots", "full"):
        own = figures["policies"][policy]
        assert set(own) == {"temporary_bytes", "total_bytes", "matmul_flops", "compile_seconds", "ms"}
        assert own["ms"] > 0
        assert own["total_bytes"] > own["temporary_bytes"] > 0
        assert any(line.startswith(f"| {policy} |") for line in lines)
    assert set(figures["ratios"]["none"].values()) == {1.0}
    recomputed = [figures["ratios"][policy]["matmul_flops"] for policy in ("none", "dots", "full")]
    assert recomputed == sorted(recomputed)
    assert 1 < recomputed[1] < recomputed[2] < 2


@pytest.mark.slow
def test_compiling_alone_measures_memory_and_no_time_and_json_prints_one_line(architecture):
    figures, lines = figures_of("remat", architecture, *SMALL, "dtype=bfloat16", "--compile-only", "--json")
    assert len(lines) == 1
    assert all(own["ms"] is None and own["temporary_bytes"] for own in figures["policies"].values())
    assert all("ms" not in ratios for ratios in figures["ratios"].values())


DECODE = [
    "prompts=2",
    "samples=3",
    "tokens=32",
    "image_px=[56,56]",
    "min_new_tokens=2",
    "max_new_tokens=12",
    "decode_rows=4",
]


def test_decode_prints_both_engines_whose_greedy_tokens_are_the_same(architecture):
    figures, lines = figures_of("decode", architecture, *DECODE, "--against", "hf")
    assert set(figures["engines"]) == {"sif_jax", "transformers"}
    assert figures["same_tokens"] == 1
    assert figures["completion_tokens"] == sum([2, 4, 6, 8, 10, 12])
    for own in figures["engines"].values():
        assert own["tokens_per_second"] == pytest.approx(42 / own["seconds"])
    ours, theirs = (figures["engines"][name]["seconds"] for name in ("sif_jax", "transformers"))
    assert figures["ratio"] == pytest.approx(theirs / ours)
    assert 0.5 < figures["rollout"]["useful_share"] < 1
    step = figures["step"]
    assert step["of_bandwidth"] == pytest.approx(step["bytes"] / step["seconds"] / step["bandwidth"])
    assert any(line.startswith("| transformers |") for line in lines)


def test_decode_alone_samples_at_a_temperature_and_prints_one_line(architecture):
    figures, lines = figures_of("decode", architecture, *DECODE, "temperature=1.0", "--json")
    assert len(lines) == 1
    assert set(figures["engines"]) == {"sif_jax"}
    assert "ratio" not in figures


def test_decode_refuses_lengths_that_cannot_be(architecture):
    result = invoke("decode", architecture, *DECODE, "min_new_tokens=13")
    assert result.exit_code == 2
    assert "min_new_tokens is above max_new_tokens; got 13; expected at most 12" in result.stderr


def test_precision_reports_every_row_of_a_records_file_and_the_whole():
    files = tiny_files()
    figures, lines = figures_of(
        "precision",
        f"model.path={files / 'model'}",
        f"model.max_pixels={MAX_PIXELS}",
        f"data.path={files}/scenes/test.json",
        "data.limit=2",
    )
    assert {"bench", "machine", "config", "tokens", "mean_kl", "max_kl", "inputs"} == set(figures)
    assert len(figures["inputs"]) == 2
    assert figures["tokens"] == sum(x["tokens"] for x in figures["inputs"].values())
    assert 0 < figures["mean_kl"] < figures["max_kl"] < 0.1
    assert sum(line.startswith("| row ") for line in lines) == 2


def test_float32_against_itself_on_the_built_in_conversations_has_no_divergence():
    figures, _ = figures_of("precision", f"model.path={tiny_checkpoint()}", "model.dtype=float32", "--json")
    assert set(figures["inputs"]) == {"text", "one image", "two images"}
    assert figures["max_kl"] == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["remat", "architecture=nowhere"], "no model here"),
        (["remat", f"architecture={tiny_checkpoint()}", "image_px=[60,56]"], "a multiple of 28"),
        (["remat", f"architecture={tiny_checkpoint()}", "tokens=8"], "the images fill the row"),
        (["remat", "policy=full"], "policy"),
        (["precision"], "model"),
        (["precision", "model.path=nowhere"], "nowhere"),
        (["precision", f"model.path={tiny_checkpoint()}", "data.path=nowhere.json"], "nowhere.json"),
    ],
)
def test_bad_input_is_one_clear_line(arguments, message):
    result = invoke(*arguments)
    assert result.exit_code == 2
    error = [line for line in result.stderr.splitlines() if not line.startswith("attention:")]
    assert len(error) == 1
    assert error[0].startswith("error: ")
    assert message in error[0]


def test_matmul_flops_count_loops_recomputation_and_the_costliest_branch():
    x, w = jnp.ones((3, 5)), jnp.ones((5, 5))
    one = 2 * 3 * 5 * 5

    def flops(function, *arguments):
        return matmul_flops(jax.jit(function).trace(*arguments).jaxpr.jaxpr)

    def stack(x, w, policy):
        return jax.lax.scan(policy(lambda x, w: (jnp.sin(x @ w), None)), x, jnp.stack([w] * 4))[0].sum()

    assert flops(lambda x, w: x @ w, x, w) == one
    assert flops(lambda x, w: stack(x, w, lambda body: body), x, w) == 4 * one
    assert flops(jax.grad(lambda x, w: stack(x, w, lambda body: body)), x, w) == 8 * one
    assert flops(jax.grad(lambda x, w: stack(x, w, jax.checkpoint)), x, w) == 12 * one
    assert flops(lambda x, w: jax.lax.cond(x[0, 0] > 0, lambda: x @ w @ w, lambda: x), x, w) == 2 * one
