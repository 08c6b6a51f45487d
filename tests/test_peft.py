"""Adapters against PEFT: which modules, what they compute, their gradients, and the files in both directions.

Logits agree within 1e-4 of the largest logit, and gradients within 1e-4 of each tensor's largest: both sides compute in
float32, in another order of summation.
"""

import dataclasses
import json
from copy import deepcopy
from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file
from safetensors.torch import load_file as load_torch
from safetensors.torch import save_file as save_torch

import sif_jax
from sif_jax.errors import InputError
from sif_jax.models.qwen2_5_vl.adapter import load_adapter, save_adapter
from sif_jax.models.qwen2_5_vl.layers import LoRAParam
from sif_jax.models.qwen2_5_vl.lora import Adapter, add_lora, lora_of, merge_lora, module_names
from sif_jax.models.qwen2_5_vl.weights import load_model
from sif_jax.ops import scan
from sif_jax.training.policy import next_token_loss
from tests.checkpoints import tiny_checkpoint, torch_model
from tests.test_model_parity import MESSAGES, batch_of, torch_inputs

# transformers 5 renames a property that PEFT still reads.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@pytest.fixture(autouse=True)
def layers_in_a_loop(monkeypatch):
    """As in a model of real depth; a short stack would be written out, which compiles longer."""
    monkeypatch.setattr(scan, "UNROLLED_LAYERS", 0)


DECODER_REGEX = r"model\.language_model\.layers\.\d+\.(self_attn\.[qv]_proj|mlp\.down_proj)"
CASES = {
    "a list": {"target_modules": ["q_proj", "v_proj"], "r": 1, "lora_alpha": 3},
    "all linear layers, rank-stabilised": {"target_modules": "all-linear", "r": 8, "lora_alpha": 4, "use_rslora": True},
    "a regex, rank above the width": {"target_modules": DECODER_REGEX, "r": 100, "lora_alpha": 50},
    "vision modules": {"target_modules": ["qkv", "attn.proj", "mlp.0", "mlp.2"], "r": 3, "lora_alpha": 16},
}


def peft_model(**config) -> peft.PeftModel:
    """The tiny checkpoint in torch with an adapter that looks trained: B is not zero."""
    torch.manual_seed(1)
    model = peft.get_peft_model(
        deepcopy(torch_model(tiny_checkpoint())), peft.LoraConfig(task_type="CAUSAL_LM", **config)
    )
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "lora_B" in name:
                value.normal_(std=0.05)
    return model.eval()


def our_model(**config):
    """The same checkpoint in JAX, with an adapter that looks trained."""
    model = load_model(tiny_checkpoint())
    lora = {"rank": 4, "alpha": 6.0, "dropout": 0.1, "targets": "all-linear", "freeze_vision": False} | config
    add_lora(model, **lora, rngs=nnx.Rngs(params=0))
    graphdef, factors, rest = nnx.split(model, LoRAParam, ...)
    noise = np.random.default_rng(0)
    trained = jax.tree.map(lambda x: x + 0.05 * noise.normal(size=x.shape).astype(np.float32), factors)
    return nnx.merge(graphdef, trained, rest)


def our_logits(model, encoded) -> np.ndarray:
    graphdef, state = nnx.split(model)
    return dataclasses.replace(sif_jax.load(tiny_checkpoint()), graphdef=graphdef, state=state).logits(encoded)


def their_logits(model, encoded) -> np.ndarray:
    with torch.no_grad():
        return model(**torch_inputs(encoded)).logits[0].numpy()


@pytest.fixture(scope="module")
def conversation():
    return sif_jax.load(tiny_checkpoint()).encode(MESSAGES["two images"])


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A plain adapter as PEFT saves it; tests that damage it copy it first."""
    directory = tmp_path_factory.mktemp("peft") / "adapter"
    peft_model(target_modules=["q_proj", "down_proj"], r=2, lora_alpha=5, lora_dropout=0.25).save_pretrained(directory)
    return directory


def distance(ours: np.ndarray, theirs: np.ndarray) -> float:
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


def assert_same(one: Adapter, other: Adapter) -> None:
    assert dataclasses.replace(one, factors={}) == dataclasses.replace(other, factors={})
    assert one.factors.keys() == other.factors.keys()
    for name, factors in one.factors.items():
        for ours, theirs in zip(factors, other.factors[name], strict=True):
            assert ours.dtype == theirs.dtype == jnp.float32
            np.testing.assert_array_equal(ours, theirs)


def our_modules(targets) -> set[str]:
    model = load_model(tiny_checkpoint())
    add_lora(model, rank=1, alpha=1.0, dropout=0.0, targets=targets, freeze_vision=False, rngs=nnx.Rngs(0))
    names = module_names(model)
    return {module for name in lora_of(model).factors for module in names[name]}


def their_modules(targets) -> set[str]:
    """The patch embedding, a convolution, is left out: ours is never adapted."""
    return set(peft_model(target_modules=targets, r=1).targeted_module_names) - {"model.visual.patch_embed.proj"}


@pytest.mark.parametrize("targets", ["all-linear", DECODER_REGEX, r"(?!.*visual).*mlp\.(gate|up)_proj"])
def test_a_pattern_adapts_the_modules_that_peft_adapts(targets):
    assert our_modules(targets) == their_modules(targets)


NAMES = ["q_proj", "self_attn.k_proj", "proj", "attn.proj", "gate_proj", "mlp.0", "merger.mlp.2", "qkv", "mlp.up_proj"]


@settings(deadline=None, max_examples=8)
@given(st.lists(st.sampled_from(NAMES), min_size=1, unique=True))
def test_a_list_of_names_adapts_the_modules_that_peft_adapts(targets):
    assert our_modules(targets) == their_modules(targets)


@pytest.mark.parametrize("case", CASES)
def test_an_adapter_of_peft_gives_its_logits_here(case, tmp_path, conversation, measured):
    reference = peft_model(**CASES[case])
    reference.save_pretrained(tmp_path)
    model = load_model(tiny_checkpoint())
    load_adapter(model, tmp_path)
    theirs = their_logits(reference, conversation)
    assert distance(their_logits(torch_model(tiny_checkpoint()), conversation), theirs) > 0.01
    measured(f"logits with a PEFT adapter on {case}", distance(our_logits(model, conversation), theirs), at_most=1e-4)


def test_our_adapter_gives_our_logits_in_peft(tmp_path, conversation, measured):
    model, directory = our_model(), tmp_path / "adapter"
    save_adapter(model, directory, base=str(tiny_checkpoint()))
    reference = peft.PeftModel.from_pretrained(deepcopy(torch_model(tiny_checkpoint())), directory).eval()
    assert set(reference.base_model.targeted_module_names) == our_modules("all-linear")
    difference = distance(our_logits(model, conversation), their_logits(reference, conversation))
    measured("logits of an adapter of ours in PEFT", difference, at_most=1e-4)


@pytest.mark.parametrize("targets", ["language", ["gate_proj", "mlp.2"], r"model\.visual\.merger.*"])
def test_peft_adapts_exactly_the_modules_that_we_adapted(targets, tmp_path):
    save_adapter(our_model(targets=targets), tmp_path / "adapter", base=str(tiny_checkpoint()))
    reference = peft.PeftModel.from_pretrained(deepcopy(torch_model(tiny_checkpoint())), tmp_path / "adapter")
    assert set(reference.base_model.targeted_module_names) == our_modules(targets)


def test_an_adapter_comes_back_from_peft_bit_for_bit_and_laid_out_as_it_went(tmp_path):
    ours, first, second = our_model(rank=3, alpha=0.7, targets=["q_proj", "mlp.0", "gate_proj"]), "first", "second"
    save_adapter(ours, tmp_path / first, base=str(tiny_checkpoint()))
    model = peft.PeftModel.from_pretrained(deepcopy(torch_model(tiny_checkpoint())), tmp_path / first)
    model.save_pretrained(tmp_path / second)
    back = load_model(tiny_checkpoint())
    load_adapter(back, tmp_path / second)
    assert_same(lora_of(back), lora_of(ours))

    tensors, again = (load_file(tmp_path / name / "adapter_model.safetensors") for name in (first, second))
    assert {name: (x.shape, x.dtype) for name, x in tensors.items()} == {
        name: (x.shape, x.dtype) for name, x in again.items()
    }
    config, again = (json.loads((tmp_path / name / "adapter_config.json").read_text()) for name in (first, second))
    assert config == {key: again[key] for key in config}


def test_an_adapter_saved_here_is_the_one_loaded_here(tmp_path):
    ours, back = our_model(), load_model(tiny_checkpoint())
    save_adapter(ours, tmp_path / "adapter", base="Qwen/Qwen2.5-VL-7B-Instruct")
    load_adapter(back, tmp_path / "adapter")
    assert_same(lora_of(back), lora_of(ours))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter"]


def test_dropout_and_scale_come_from_the_file(saved):
    model = load_model(tiny_checkpoint())
    load_adapter(model, saved)
    adapter = lora_of(model)
    assert (adapter.rank, adapter.alpha, adapter.dropout) == (2, 5.0, 0.25)


def copy_of(saved: Path, directory: Path, *, tensors=None, **config) -> Path:
    """The saved adapter with other tensors or settings."""
    directory.mkdir()
    raw = json.loads((saved / "adapter_config.json").read_text()) | config
    (directory / "adapter_config.json").write_text(json.dumps(raw))
    save_file(
        load_file(saved / "adapter_model.safetensors") if tensors is None else tensors,
        directory / "adapter_model.safetensors",
    )
    return directory


def test_the_spelling_before_transformers_4_52_is_read(tmp_path):
    ours, new, old = our_model(), load_model(tiny_checkpoint()), {}
    save_adapter(ours, tmp_path / "new", base="base")
    for name, value in load_file(tmp_path / "new" / "adapter_model.safetensors").items():
        old[
            name.replace(".model.model.language_model.", ".model.model.").replace(
                ".model.model.visual.", ".model.visual."
            )
        ] = value
    assert "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight" in old
    assert "base_model.model.visual.merger.mlp.0.lora_B.weight" in old
    load_adapter(new, copy_of(tmp_path / "new", tmp_path / "old", tensors=old))
    assert_same(lora_of(new), lora_of(ours))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_factors_stored_in_half_precision_become_float32(dtype, saved, tmp_path):
    directory = copy_of(saved, tmp_path / "half")
    tensors = {name: x.to(dtype) for name, x in load_torch(saved / "adapter_model.safetensors").items()}
    save_torch(tensors, directory / "adapter_model.safetensors")
    model = load_model(tiny_checkpoint(), dtype="bfloat16")
    load_adapter(model, directory)
    b = lora_of(model).factors["decoder.layers.q_proj"].b
    assert b.dtype == jnp.float32
    name = "base_model.model.model.language_model.layers.2.self_attn.q_proj.lora_B.weight"
    np.testing.assert_array_equal(b[2], tensors[name].float().numpy().T)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"peft_type": "LOHA"}, "wrong value of peft_type; got 'LOHA'; expected Input should be 'LORA'"),
        ({"use_dora": True}, "use_dora is not supported; got True"),
        ({"bias": "lora_only"}, "wrong value of bias; got 'lora_only'"),
        ({"lora_bias": True}, "lora_bias is not supported"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save is not supported; got \['lm_head'\]"),
        ({"rank_pattern": {"q_proj": 4}}, "rank_pattern is not supported"),
        ({"alpha_pattern": {"q_proj": 4}}, "alpha_pattern is not supported"),
        ({"init_lora_weights": "pissa_niter_4"}, "wrong value of init_lora_weights; got 'pissa_niter_4'"),
        ({"r": 0}, "wrong value of r; got 0"),
        (
            {"r": 4},
            r"layers\.0\.\S+ has another rank than adapter_config.json; got \(2, \d\d\); expected \(4, \d\d\)",
        ),
        ({"lora_alpha": "high"}, "wrong value of lora_alpha; got 'high'"),
        ({"lora_dropout": 1.0}, "wrong value of lora_dropout; got 1.0"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_config_that_says_more_than_plain_lora_is_refused(config, message, saved, tmp_path):
    refused(copy_of(saved, tmp_path / "other", **config), message)


LAYER = "base_model.model.model.language_model.layers.{}.{}.weight"
Q_A, Q_B = (LAYER.format(1, f"self_attn.q_proj.lora_{factor}") for factor in "AB")
EMBEDDING = "base_model.model.model.language_model.embed_tokens.lora_embedding_A"
HEAD_A = "base_model.model.lm_head.lora_A.weight"
PATCH_A = "base_model.model.model.visual.patch_embed.proj.lora_A.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({EMBEDDING: np.zeros((2, 320))}, "not a factor of a linear layer; got '.*embed_tokens.lora_embedding_A'"),
        ({HEAD_A: np.zeros((2, 48))}, "no linear layer of this model; got 'lm_head'; expected modules among .*q_proj"),
        ({PATCH_A: np.zeros((2, 3, 2, 14, 14))}, r"no linear layer of this model; got 'model.visual.patch_embed.proj'"),
        (
            {LAYER.format(3, "self_attn.q_proj.lora_A"): np.zeros((2, 48))},
            r"no linear layer.*got '.*layers\.3\.self_attn",
        ),
        ({Q_A: None, Q_B: None}, r"layers\.\*\.self_attn\.q_proj is adapted in some layers only; got \[0, 2\]"),
        ({Q_A: None}, r"a factor is missing; expected .*layers\.1\.self_attn\.q_proj\.lora_A\.weight"),
        ({Q_B: None}, r"a factor is missing; expected .*layers\.1\.self_attn\.q_proj\.lora_B\.weight"),
        (
            {Q_A: np.zeros((2, 64))},
            r"another base model than SOURCE: .*q_proj\.lora_A.*got \(2, 64\); expected \(2, 48\)",
        ),
        (
            {Q_B: np.zeros((64, 2))},
            r"another base model than SOURCE: .*q_proj\.lora_B.*got \(64, 2\); expected \(48, 2\)",
        ),
        ({Q_B: np.zeros(48)}, r"another base model than SOURCE: .*got \(48,\); expected \(48, 2\)"),
        ({Q_B: np.full((48, 2), np.nan)}, r"q_proj\.lora_B\.weight holds NaN"),
    ],
)
def test_tensors_that_do_not_fit_are_refused_by_name(change, message, saved, tmp_path):
    tensors = load_file(saved / "adapter_model.safetensors") | change
    tensors = {name: x.astype(np.float32) for name, x in tensors.items() if x is not None}
    refused(copy_of(saved, tmp_path / "other", tensors=tensors), message)


def test_files_that_are_missing_or_damaged_are_refused(saved, tmp_path):
    refused(tmp_path / "nowhere", r"adapter_config\.json: cannot be read \(No such file")
    adapter = copy_of(saved, tmp_path / "adapter")
    weights, config = adapter / "adapter_model.safetensors", adapter / "adapter_config.json"
    weights.write_bytes(weights.read_bytes()[:100])
    refused(adapter, r"adapter_model\.safetensors: cannot be read")
    weights.rename(adapter / "adapter_model.bin")
    refused(adapter, r"adapter_model\.bin: a pickle is never read; expected adapter_model\.safetensors")
    (adapter / "adapter_model.bin").unlink()
    refused(adapter, r"adapter_model\.safetensors: cannot be read")
    save_file({}, weights)
    refused(adapter, "holds no adapter")
    for text, message in [
        ("{", "not JSON"),
        ("[]", "wrong value of the whole file"),
        ("{}", "wrong value of peft_type"),
    ]:
        config.write_text(text)
        refused(adapter, message)


@cache
def plain_model():
    return load_model(tiny_checkpoint())


def refused(directory: Path, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        load_adapter(plain_model(), directory, source="SOURCE")
    assert "\n" not in str(caught.value)


def test_an_adapter_is_not_saved_over_another_nor_without_one_nor_loaded_twice(saved, tmp_path):
    model = load_model(tiny_checkpoint())
    with pytest.raises(InputError, match="no adapter to save"):
        save_adapter(model, tmp_path / "adapter", base="base")
    load_adapter(model, saved)
    with pytest.raises(InputError, match="already exists"):
        save_adapter(model, saved, base="base")
    with pytest.raises(InputError, match="has an adapter already"):
        load_adapter(model, saved)
    merge_lora(model)
    load_adapter(model, saved)


@pytest.fixture(scope="module")
def peft_gradients(tmp_path_factory):
    """(directory of an adapter on every linear layer, loss, its gradient by tensor name) over three conversations."""
    directory = tmp_path_factory.mktemp("gradients") / "adapter"
    model = peft_model(target_modules="all-linear", r=4, lora_alpha=8)
    model.save_pretrained(directory)
    vlm, total = sif_jax.load(tiny_checkpoint()), torch.zeros(())
    for name in CONVERSATIONS:
        inputs = torch_inputs(vlm.encode(MESSAGES[name]))
        logprobs = torch.log_softmax(model(**inputs).logits[0, :-1], dim=-1)
        total = total - logprobs.gather(1, inputs["input_ids"][0, 1:, None])[-5:].sum()
    total.backward()
    gradients = {
        name.replace(".default.", "."): x.grad.numpy() for name, x in model.named_parameters() if x.grad is not None
    }
    return directory, total.item(), gradients


CONVERSATIONS = ["two images", "text", "one image"]


@pytest.mark.parametrize("remat", ["none", "dots", "full"])
def test_loss_and_adapter_gradients_equal_peft_through_the_vision_tower(remat, peft_gradients, tmp_path, measured):
    directory, expected, theirs = peft_gradients
    batch = jax.tree.map(jnp.asarray, batch_of(sif_jax.load(tiny_checkpoint()), CONVERSATIONS))
    model = load_model(tiny_checkpoint(), remat=remat)
    load_adapter(model, directory)
    graphdef, factors, frozen = nnx.split(model, LoRAParam, ...)

    @jax.jit
    def gradients(factors, frozen, batch):
        return jax.value_and_grad(
            lambda factors: next_token_loss(nnx.merge(graphdef, factors, frozen), batch, None)[0]
        )(factors)

    loss, ours = gradients(factors, frozen, batch)
    save_adapter(nnx.merge(graphdef, ours, frozen), tmp_path / "gradients", base="base")
    ours = load_file(tmp_path / "gradients" / "adapter_model.safetensors")
    assert ours.keys() == theirs.keys()
    largest = max(np.abs(ours[name] - x).max() / max(np.abs(x).max(), 1e-3) for name, x in theirs.items())
    measured(f"SFT loss with LoRA against PEFT, remat {remat}, relative", abs(loss / expected - 1), at_most=1e-5)
    measured(f"LoRA gradients against PEFT, remat {remat}, relative", largest, at_most=1e-4)
