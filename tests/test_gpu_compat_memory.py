"""The memory plan: exact parameters, formulas by hand, activations held against what XLA allocates, and its advice."""

import jax
import jax.numpy as jnp
import pytest

from gpu_compat.cards import CARDS, card_of
from gpu_compat.memory import GIB, MODELS, PAPER, ROOT, main, open_setting, plan, read_config, remedies
from sif_jax.bench.workload import abstract_policy, random_batch
from sif_jax.config import GrpoConfig, SftConfig
from sif_jax.models.qwen2_5_vl.config import Qwen2_5_VLConfig
from sif_jax.plan.memory_model import Shape, _backward, in_use, kv_bytes
from sif_jax.plan.model_size import model_size
from sif_jax.rollout.engine import encode_images
from sif_jax.training import grpo, sft

PUBLISHED = {"3B": 3_754_622_976, "7B": 8_292_166_656, "32B": 33_452_718_336, "72B": 73_410_777_344}
SLOW = pytest.mark.slow
SFT, GRPO = (str(ROOT / path) for path in PAPER)


def setting(model="7B", gpu="h20", count=8, fsdp=1, path=SFT, words=()):
    return open_setting(read_config(path, words), model, gpu, count, fsdp)


@pytest.mark.parametrize("model", MODELS)
def test_parameters_are_those_of_the_published_model_and_its_adapters(model):
    size, text = setting(model).size, setting(model).model.text
    assert size.parameters == PUBLISHED[model]
    assert size.frozen_bytes == 2 * PUBLISHED[model]
    D, F, H = text.hidden_size, text.intermediate_size, text.head_dim
    heads, kv = text.num_attention_heads * H, text.num_key_value_heads * H
    in_plus_out = (D + heads) + 2 * (D + kv) + (heads + D) + 2 * (D + F) + (F + D)
    assert size.trainable == 8 * text.num_hidden_layers * in_plus_out  # rank 8, float32
    assert size.trainable_bytes == 4 * size.trainable


def test_what_a_run_holds_is_counted_by_hand():
    parts = plan(setting()).held
    lora, layer = 20_185_088, 233_057_792  # parameters; of the layer 2 norms, q, k, v with biases, o, gate, up, down
    assert parts == {
        "frozen weights": 2 * PUBLISHED["7B"],
        "trained weights": 4 * lora,
        "gradients": 2 * 4 * lora,  # the sum so far and the new one: accumulation 8
        "optimizer": 2 * 4 * lora,
        "reference": 0,
        "weights in use": 2 * layer + 4 * lora / 28,
    }


def test_splitting_divides_what_is_held_and_adds_what_is_gathered():
    whole, split = plan(setting()), plan(setting(fsdp=8))
    for name, amount in whole.held.items():
        if name != "weights in use":
            assert split.held[name] == amount / 8
    size = setting().size
    assert size.head_bytes == 2 * 3584 * 152064
    assert split.held["weights in use"] == 2 * size.layer_bytes + size.head_bytes


def test_a_full_fine_tune_holds_bfloat16_gradients_and_float32_moments_and_a_copy_of_its_start_for_the_kl():
    full = setting(path=GRPO, words=["lora=null", "freeze_vision=false", "micro_batch=2"])
    parts, count = plan(full).held, PUBLISHED["7B"]
    assert parts["frozen weights"] == 0
    assert [parts[name] for name in ("trained weights", "gradients", "optimizer", "reference")] == [
        2 * count,
        2 * count,
        8 * count,
        2 * count,
    ]


def test_keys_and_values_of_7b_take_56_kib_per_token():
    assert kv_bytes(setting().model, 1, 2) == 56 * 1024
    rollout = plan(setting(path=GRPO)).phases[0].parts
    # 2 prompts do not divide over 8 devices, 8 samples do: each device has both prompts and one sample of each
    assert rollout["KV of prompts"] == 2 * 1024 * 56 * 1024
    assert rollout["KV of samples"] == 1.5 * 2 * 2048 * 56 * 1024


def test_a_rollout_holds_a_second_copy_of_the_decoder_unless_its_layers_are_apart_from_the_start():
    def copied(*words: str) -> float:
        return plan(setting(path=GRPO, words=list(words))).phases[0].parts["layers apart"]

    assert 12e9 < copied() < 2 * PUBLISHED["7B"]
    assert copied("model.scan_layers=false") == copied("separate_layers=false") == 0


def bench_model() -> Qwen2_5_VLConfig:
    return Qwen2_5_VLConfig.from_directory(ROOT / "configs" / "bench" / "100M")


def as_config(kind, remat):
    rest = {"run": {"name": "x"}, "data": {"path": "x"}, "lora": {"rank": 8}, "optimizer": {"learning_rate": 1e-4}}
    return kind.model_validate(rest | {"model": {"path": "x", "dtype": "float32", "remat": remat}})


def ratio(config, shape, compiled) -> float:
    """Ours over XLA's temporaries; the batch is an argument there."""
    parts = _backward(config, bench_model(), shape)
    ours = sum(parts.values()) - parts["batch"] + in_use(model_size(bench_model(), config), 1)
    return ours / compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize(
    ("rows", "remat"),
    [
        (1, "full"),
        pytest.param(3, "full", marks=SLOW),
        pytest.param(1, "dots", marks=SLOW),
        pytest.param(1, "none", marks=SLOW),
    ],
)
def test_activations_of_sft_are_within_a_quarter_of_what_xla_allocates(rows, remat):
    batch = random_batch(bench_model(), rows=rows, tokens=1024, image_px=(364, 252))
    graphdef, trainable, frozen = abstract_policy(bench_model(), remat=remat)
    key = jax.eval_shape(lambda: jax.random.key(0))
    compiled = sft.make_gradients(graphdef, dropout=False).lower(None, trainable, frozen, batch, key).compile()
    shape = Shape(rows, 1024, 0, 0, batch["patches"].shape[1])
    assert 0.75 < ratio(as_config(SftConfig, remat), shape, compiled) < 1.25


def test_activations_of_grpo_are_within_a_quarter_of_what_xla_allocates():
    config, batch = as_config(GrpoConfig, "full"), random_batch(bench_model(), rows=1, tokens=512, image_px=(364, 252))
    graphdef, trainable, frozen = abstract_policy(bench_model(), remat="full")
    features = jax.eval_shape(lambda *states: encode_images(graphdef, states, batch), trainable, frozen)
    tokens, each = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in [(1, 4, 512), (1, 4)])
    ids, mask = tokens.update(dtype=jnp.int32), tokens.update(dtype=jnp.bool_)
    completions = grpo.Completions(batch, features, ids, tokens, mask)
    groups = grpo.Groups(completions, tokens, each, each.update(dtype=jnp.bool_))
    key = jax.eval_shape(lambda: jax.random.key(0))
    compiled = grpo.make_gradients(graphdef, config).lower(None, trainable, frozen, groups, key).compile()
    assert 0.75 < ratio(config, Shape(1, 512, 4, 512, batch["patches"].shape[1]), compiled) < 1.25


@pytest.mark.parametrize("path", [SFT, GRPO])
def test_the_papers_machine_holds_the_papers_configs(path):
    assert plan(setting(path=path)).head_room > 0


@pytest.mark.parametrize(("model", "gpu", "fsdp"), [("72B", "h20", 1), ("7B", "4090", 1), ("72B", "4090", 8)])
def test_the_sum_of_the_parts_and_the_head_room_is_the_budget(model, gpu, fsdp):
    result = plan(setting(model, gpu, fsdp=fsdp))
    needed = sum(result.held.values()) + max(sum(phase.parts.values()) for phase in result.phases)
    assert needed + result.head_room == pytest.approx(0.92 * CARDS[gpu].memory_gib * GIB)


def test_what_does_not_fit_is_told_by_how_much_and_what_would_fit(capsys):
    assert main(["--gpu", "a100-40", "--config", SFT]) == 1
    out = capsys.readouterr().out
    short = -plan(setting(gpu="a100-40", count=1)).head_room / GIB
    assert f"does not fit: {short:.2f} GiB too much. What would:" in out
    assert "  - batch_size=8 accumulation=16\n" in out
    assert "  - the same on l40s (--gpu l40s)\n" in out
    assert main(["--gpu", "a100-40", "--config", SFT, "batch_size=8", "accumulation=16"]) == 0


def test_every_remedy_is_an_answer_and_none_is_given_where_nothing_helps():
    assert any("--fsdp 2" in remedy for remedy in remedies(setting("72B", "h20")))
    assert plan(setting("72B", "h20", fsdp=2)).head_room > 0
    assert next(remedies(setting("7B", "h20", words=["model.remat=none"], count=1))) == "model.remat=full"


def test_a_table_shows_every_card_and_model(capsys):
    assert main(["--table", "--count", "8", "--config", SFT]) == 0
    rows = capsys.readouterr().out.splitlines()
    assert [row.split(" | ")[0].strip("| ") for row in rows[4 : 4 + len(CARDS)]] == list(CARDS)
    assert all(row.count("GiB free") + row.count("no") == len(MODELS) for row in rows[4 : 4 + len(CARDS)])


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--count", "3"], "error: rows do not divide over the devices; got 16; expected 3; fix: change batch_size"),
        (["--count", "8", "--fsdp", "3"], "error: the GPUs do not divide; got '--fsdp 3'; expected a divisor of 8"),
        (["--count", "0"], "error: not a number of GPUs; got 0; expected 1 or more"),
        (["--model", "nowhere"], "error: nowhere/config.json: no model here"),
        (["lora.rnk=8"], "error: command line: unknown key lora.rnk"),
        (["--config", "nowhere.yaml"], "error: nowhere.yaml: cannot read this config"),
    ],
)
def test_bad_input_is_one_clear_line_and_exit_code_2(arguments, says, capsys):
    assert main(["--gpu", "h20", "--config", SFT, *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith(says)
    assert error.count("\n") == 1


@pytest.mark.parametrize("name", CARDS)
def test_a_card_is_known_by_what_jax_calls_it(name):
    assert card_of(CARDS[name].name) == CARDS[name]


@pytest.mark.parametrize("kind", ["NVIDIA H20-3e", "NVIDIA H100 PCIe", "cpu"])
def test_a_card_or_a_variant_without_a_data_sheet_is_unknown(kind):
    assert card_of(kind) is None
