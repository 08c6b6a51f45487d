"""Configs: what is read, what is refused, and how the refusal reads."""

from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from sif_jax.config import (
    AblationConfig,
    DemoConfig,
    EvalConfig,
    GenerateConfig,
    GrpoConfig,
    OptimizerConfig,
    ScenesBuildConfig,
    SftConfig,
    TinyModelConfig,
    describe,
    dump_config,
    flat_config,
    load_config,
)
from sif_jax.errors import InputError
from tests.conftest import ROOT

KINDS = {"sft": SftConfig, "grpo": GrpoConfig, "eval": EvalConfig, "demo": DemoConfig}
SFT = ["run.name=x", "model.path=m", "data.path=d", "optimizer.learning_rate=1e-4"]
GENERATE = ["model.path=m", "image=i.png", "depth=d.png"]


def refusal(kind, overrides, path=None) -> str:
    with pytest.raises(InputError) as caught:
        load_config(kind, path, overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    "path", sorted((ROOT / "configs").rglob("*.yaml")), ids=lambda path: f"{path.parent.name}-{path.stem}"
)
def test_every_shipped_config_loads(path):
    load_config(AblationConfig if path.parent.name == "ablation" else KINDS[path.stem], path)


def test_the_paper_sft_config_states_the_papers_settings():
    config = load_config(SftConfig, ROOT / "configs/paper/sft.yaml")
    assert config.model.path == "Qwen/Qwen2.5-VL-7B-Instruct"
    assert (config.model.dtype, config.model.max_pixels) == ("bfloat16", 262144)
    assert config.lora is not None
    assert (config.lora.rank, config.lora.targets) == (8, "all-linear")
    assert (config.epochs, config.batch_size, config.accumulation) == (3, 2 * 8, 8)
    assert config.data.buckets.tokens[-1] == 2048
    optimizer = config.optimizer
    assert (optimizer.learning_rate, optimizer.schedule, optimizer.warmup_ratio) == (1e-4, "cosine", 0.1)


def test_the_paper_grpo_config_states_the_papers_settings():
    config = load_config(GrpoConfig, ROOT / "configs/paper/grpo.yaml")
    assert config.lora is not None
    assert (config.lora.rank, config.lora.alpha, config.lora.dropout) == (64, 128, 0.05)
    assert config.freeze_vision
    assert (config.num_samples, config.objective.kl_beta, config.epochs, config.data.limit) == (8, 0.04, 20, 200)
    assert (config.max_new_tokens, config.optimizer.learning_rate, config.rewards.compat) == (2048, 1e-5, "paper")


def test_the_shipped_demo_config_is_the_default():
    assert load_config(DemoConfig, ROOT / "configs/demo/demo.yaml") == DemoConfig()


def test_overrides_win_over_the_file_and_are_read_as_yaml(tmp_path):
    path = tmp_path / "sft.yaml"
    path.write_text("run: {name: a, seed: 1}\nmodel: {path: m}\ndata: {path: d}\noptimizer: {learning_rate: 0.5}\n")
    config = load_config(
        SftConfig,
        path,
        ["run.seed=7", "packing=true", "max_steps=5", "lora.rank=4", "data.buckets.tokens=[8, 16]", "data.limit=null"],
    )
    assert (config.run.name, config.run.seed, config.packing, config.max_steps, config.data.limit) == (
        "a",
        7,
        True,
        5,
        None,
    )
    assert config.lora is not None
    assert (config.lora.rank, config.data.buckets.tokens) == (4, (8, 16))


def test_packing_without_an_end_is_refused():
    with pytest.raises(InputError, match=r"packing=true.*max_steps"):
        load_config(SftConfig, None, [*SFT, "packing=true"])


@given(st.text(min_size=1).filter(lambda text: text != "null"))
@settings(deadline=None)
def test_a_text_field_takes_an_override_as_it_stands(question):
    assert load_config(GenerateConfig, None, [*GENERATE, f"question={question}"]).question == question


def test_exponents_without_a_point_are_numbers():
    assert load_config(SftConfig, None, [*SFT, "optimizer.eps=1e-6"]).optimizer.eps == 1e-6


@given(
    rate=st.floats(1e-12, 1e3),
    schedule=st.sampled_from(["cosine", "constant", "linear"]),
    warmup=st.floats(0, 0.99),
    norm=st.none() | st.floats(1e-3, 10),
)
@settings(deadline=None, max_examples=30)
def test_a_dumped_config_loads_as_the_same_config(tmp_path_factory, rate, schedule, warmup, norm):
    config = OptimizerConfig(learning_rate=rate, schedule=schedule, warmup_ratio=warmup, max_grad_norm=norm)
    path = tmp_path_factory.mktemp("config") / "config.yaml"
    dump_config(config, path)
    assert load_config(OptimizerConfig, path) == config
    assert [entry.name for entry in path.parent.iterdir()] == ["config.yaml"]


def test_a_dumped_training_config_holds_every_key(tmp_path):
    config = load_config(GrpoConfig, ROOT / "configs/paper/grpo.yaml")
    dump_config(config, tmp_path / "c.yaml")
    assert load_config(GrpoConfig, tmp_path / "c.yaml") == config
    written = yaml.safe_load((tmp_path / "c.yaml").read_text())
    assert written["optimizer"]["b2"] == 0.999
    assert flat_config(config)["data.buckets.tokens"] == [512, 1024]


def test_a_config_is_frozen():
    with pytest.raises(ValidationError):
        load_config(SftConfig, None, SFT).epochs = 4


@pytest.mark.parametrize(
    ("override", "nearest"),
    [
        ("run.nme=y", "run.name"),
        ("optimiser.b1=0.5", "optimizer"),
        ("learning_rate=3", "optimizer.learning_rate"),
        ("lora.rnk=3", "lora.rank"),
        ("data.bucket.tokens=[3]", "data.buckets"),
    ],
)
def test_an_unknown_override_names_the_key_the_value_and_the_nearest_name(override, nearest):
    message = refusal(SftConfig, [*SFT, override])
    assert message.startswith("command line: unknown key ")
    assert f"did you mean {nearest}?" in message
    assert override.partition("=")[2].strip("[]") in message


def test_an_unknown_key_of_a_file_names_the_file(tmp_path):
    path = tmp_path / "my.yaml"
    path.write_text("run: {name: x, sed: 3}\nmodel: {path: m}\n")
    assert refusal(SftConfig, [], path) == f"{path}: unknown key run.sed; got 3; fix: did you mean run.seed?"


def test_a_key_like_no_other_is_told_what_there_is():
    message = refusal(SftConfig, [*SFT, "prompt.zzzz=1"])
    assert "fix: remove it; the keys here are depth_input, with_depth_words" in message


def test_a_missing_key_is_named_by_its_leaf():
    assert refusal(SftConfig, SFT[1:]).startswith("run.name is missing; fix: add it to the config, or give run.name=…")


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["model.dtype=float16"], "wrong value of model.dtype; got 'float16'; expected 'float32' or 'bfloat16'"),
        (["epochs=0"], "wrong value of epochs; got 0; expected greater than 0"),
        (["epochs=two"], "got 'two'; expected a valid integer"),
        (["optimizer.eps=.nan"], "expected a finite number"),
        (["lora=8"], "wrong value of lora; got 8; expected a section"),
        (["lora.rank=8", "lora.targets=("], "lora.targets: missing )"),
        (["run.name=../x"], "run.name: not a directory name; got '../x'"),
        (["data.buckets.tokens=[16, 8]"], "data.buckets.tokens: bucket sizes out of order; got [16, 8]"),
        (["data.buckets.patches=[6]"], "got 6; expected a multiple of 4"),
        (["data.buckets.tokens=[8]"], "data.buckets: a bucket is a pair of sizes; got '1 tokens, 2 patches'"),
        (["data.buckets={tokens: [8, 8], patches: [4, 4]}"], "a bucket is listed twice; got ((8, 4), (8, 4))"),
        (["model.min_pixels=5", "model.max_pixels=4"], "got 5; expected at most 4; fix: lower min_pixels"),
        (["lora.targets=language", "freeze_vision=false"], "fix: set freeze_vision=true"),
        (["model.max_pixels=262144", "data.buckets.patches=[0, 2668]"], "got 2668; expected at least 2672; fix: raise"),
        (["seed"], "not an override; got 'seed'; expected key=value"),
        (["run..seed=1"], "not an override"),
        (["epochs=[1"], "epochs is not YAML; got '[1'"),
        (["epochs=1", "epochs.x=1"], "epochs is not a section"),
    ],
)
def test_a_wrong_value_or_combination_is_refused_in_one_line(overrides, told):
    assert told in refusal(SftConfig, [*SFT, *overrides])


def test_one_image_of_the_largest_size_needs_half_the_patches():
    fits = [*SFT, "model.max_pixels=262144", "data.buckets.patches=[0, 1336]", "prompt.depth_input=false"]
    load_config(SftConfig, None, fits)


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["num_samples=1"], "wrong value of num_samples; got 1"),
        (["temperature=0"], "wrong value of temperature; got 0"),
        (["prompts_per_step=6", "micro_batch=4"], "got 4; expected a divisor of 6; fix: change micro_batch"),
        (["judge.kind=gpt"], "wrong value of judge.kind"),
    ],
)
def test_what_grpo_cannot_do_is_refused(overrides, told):
    assert told in refusal(GrpoConfig, [*SFT, *overrides])


def test_a_prompt_with_depth_needs_a_depth_image():
    overrides = ["model.path=m", "image=i.png", "question=q"]
    assert "fix: give depth=FILE" in refusal(GenerateConfig, overrides)
    load_config(GenerateConfig, None, [*overrides, "prompt.depth_input=false"])


@pytest.mark.parametrize(
    "overrides", [["hidden_size=62"], ["num_key_value_heads=3"], ["vision.window_size=100"], ["vision.depth=1"]]
)
def test_a_tiny_model_that_cannot_be_built_is_refused(overrides):
    assert "expected" in refusal(TinyModelConfig, overrides)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("run: {name: a}\nrun: {name: b}\n", "the key 'run' stands twice"),
        ("run: [\n", "line 2"),
        ("- 1\n", "not a mapping"),
        ("run: 'unclosed", "expected YAML"),
    ],
)
def test_a_file_that_is_not_a_config_is_refused(tmp_path, text, told):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    message = refusal(SftConfig, [], path)
    assert message.startswith(f"{path}: ")
    assert told in message


def test_a_file_that_cannot_be_read_is_refused(tmp_path):
    assert "No such file" in refusal(SftConfig, [], tmp_path / "none.yaml")
    assert "Is a directory" in refusal(SftConfig, [], tmp_path)
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    assert "not a text file" in refusal(SftConfig, [], tmp_path / "binary")


def test_an_empty_file_is_a_config_of_defaults(tmp_path):
    (tmp_path / "empty.yaml").write_text("")
    assert load_config(DemoConfig, tmp_path / "empty.yaml") == DemoConfig()


@pytest.mark.parametrize("kind", [*KINDS.values(), GenerateConfig, ScenesBuildConfig])
def test_every_key_is_described(kind):
    for row in describe(kind):
        assert row.description, row.key
        assert "\n" not in row.description


def test_the_description_lists_types_and_defaults():
    rows = {row.key: row for row in describe(SftConfig)}
    assert rows["run.resume"].type == "auto | never | must"
    assert rows["max_steps"][1:3] == ("int | null", "null")
    assert rows["data.buckets.tokens"][1:3] == ("[int, ...]", "[1024, 2048]")
    assert rows["model.path"].default is None
    assert rows["lora"].type == "section | null"
    assert "lora.rank" in rows


def test_the_runs_directory_is_root_and_name():
    assert load_config(SftConfig, None, [*SFT, "run.root=/r"]).run.directory == Path("/r/x")
