"""Low-rank adapters: where they go, what they start as, what they compute, and how they are folded in."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

import sif_jax
from sif_jax.config import LoraConfig, config_text, load_config
from sif_jax.errors import InputError
from sif_jax.models.qwen2_5_vl.layers import Linear, LoRAParam
from sif_jax.models.qwen2_5_vl.lora import (
    add_lora,
    add_product,
    linear_layers,
    lora_of,
    merge_lora,
    split_trainable,
    unmerge_lora,
)
from sif_jax.models.qwen2_5_vl.weights import load_model
from tests.checkpoints import tiny_checkpoint
from tests.test_rollout import prompts

SETTINGS = {"rank": 4, "alpha": 8.0, "dropout": 0.0, "targets": "all-linear", "freeze_vision": False}


def open_adapted(dtype: str = "float32", seed: int = 0, **changed):
    model = load_model(tiny_checkpoint(), dtype=dtype)
    add_lora(model, **{**SETTINGS, **changed}, rngs=nnx.Rngs(params=seed))
    return model


def adapted(model) -> set[str]:
    return {name for name, layer in linear_layers(model).items() if layer.lora_a is not None}


def fill(model, seed: int = 1) -> None:
    """As if the adapters had been trained: B is no longer zero."""
    for number, (_, layer) in enumerate(linear_layers(model).items()):
        if layer.lora_b is not None:
            shape = layer.lora_b[...].shape
            layer.lora_b[...] = 0.05 * jax.random.normal(jax.random.key(seed + number), shape)


@pytest.fixture(scope="module")
def batch():
    return jax.tree.map(jnp.asarray, prompts(sif_jax.load(tiny_checkpoint()), ["one image"]))


def logits_of(model, batch, key=None):
    graphdef, state = nnx.split(model)

    @jax.jit
    def compute(state, batch, key):
        merged = nnx.merge(graphdef, state)
        return merged.logits(merged.hidden(batch, key))

    return np.asarray(compute(state, batch, key))


def test_all_linear_adapts_every_linear_layer_and_never_the_head_or_the_embeddings():
    names = adapted(open_adapted())
    assert {name.rsplit(".", 1)[1] for name in names if name.startswith("decoder.")} == {
        *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    }
    assert {"vision.blocks.qkv", "vision.blocks.proj", "vision.merger.fc1", "vision.merger.fc2"} <= {
        name.replace(".attn.", ".") for name in names
    }
    assert not any("head" in name or "embed_tokens" in name for name in names)


def test_language_and_a_frozen_tower_leave_the_vision_tower_without_adapters():
    language = adapted(open_adapted(targets="language"))
    assert language == adapted(open_adapted(freeze_vision=True))
    assert len(language) == 7
    assert all(name.startswith("decoder.") for name in language)


def test_the_patch_embedding_is_a_convolution_and_never_adapted():
    assert "vision.patch_embed" not in adapted(open_adapted())


@pytest.mark.parametrize(
    ("targets", "ends"),
    [
        (r"model\.language_model\.layers\.\d+\.self_attn\.(q|v)_proj", {"q_proj", "v_proj"}),
        (["q_proj", "mlp.0"], {"q_proj", "fc1"}),
        (["self_attn.o_proj", "model.visual.merger.mlp.2"], {"o_proj", "fc2"}),
        (["proj"], {"proj"}),
    ],
)
def test_targets_match_whole_names_or_their_ends(targets, ends):
    assert {name.rsplit(".", 1)[1] for name in adapted(open_adapted(targets=targets))} == ends


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"targets": "q_proj"}, r"no layer to adapt; got 'q_proj'.*layers\.\*\.self_attn\.q_proj.*fix: lora.targets"),
        ({"targets": ["q_proj", "v_prog"]}, r"no layer to adapt; got 'v_prog'.*self_attn\.v_proj"),
        ({"targets": ["_proj"]}, "no layer to adapt"),
        ({"targets": ["lm_head"]}, "no layer to adapt"),
        ({"targets": ["patch_embed.proj"]}, "no layer to adapt"),
        ({"targets": r".*layers\.[02]\..*q_proj"}, r"layers\.\*\.self_attn\.q_proj.*some layers.*got \[0, 2\].*all 3"),
        ({"targets": ["qkv", "mlp.0"], "freeze_vision": True}, "only frozen layers.*freeze_vision=false"),
        ({"targets": r"model\.visual\..*", "freeze_vision": True}, "only frozen layers"),
    ],
)
def test_targets_that_cannot_be_adapted_are_refused(changed, message):
    with pytest.raises(InputError, match=message):
        open_adapted(**changed)


def test_a_frozen_tower_takes_its_layers_out_of_a_list():
    assert adapted(open_adapted(targets=["gate_proj", "qkv"], freeze_vision=True)) == {"decoder.layers.mlp.gate_proj"}


def test_new_adapters_change_nothing_and_filled_ones_do(batch):
    base, model = load_model(tiny_checkpoint()), open_adapted()
    np.testing.assert_array_equal(logits_of(model, batch), logits_of(base, batch))
    fill(model)
    assert np.abs(logits_of(model, batch) - logits_of(base, batch)).max() > 1e-2


def test_merged_weights_give_the_same_logits_as_the_adapters(batch):
    model = open_adapted()
    fill(model)
    before = logits_of(model, batch)
    merge_lora(model)
    assert adapted(model) == set()
    real = np.asarray(batch["segments"])[0] > 0
    # The weights of this checkpoint (std 0.2) amplify float32 rounding; the adapters move the logits by more than 1e-2.
    np.testing.assert_allclose(logits_of(model, batch)[0, real], before[0, real], atol=1e-4)


def test_merging_and_unmerging_give_back_the_logits_and_the_very_factors(batch, measured):
    model = open_adapted()
    fill(model)
    before, factors = logits_of(model, batch), jax.tree.map(np.asarray, dict(lora_of(model).factors))
    unmerge_lora(model, merge_lora(model))
    after, again = logits_of(model, batch), jax.tree.map(np.asarray, dict(lora_of(model).factors))
    assert lora_of(model).alpha == SETTINGS["alpha"]
    jax.tree.map(np.testing.assert_array_equal, again, factors)
    real = np.asarray(batch["segments"])[0] > 0
    difference = np.abs(after - before)[0, real].max() / np.abs(before[0, real]).max()
    measured("logits after merging and unmerging an adapter, relative", difference, at_most=1e-4)


def test_unmerging_bfloat16_weights_is_within_one_rounding(measured):
    model = open_adapted(dtype="bfloat16")
    fill(model)
    before = {name: np.asarray(layer.kernel[...], np.float32) for name, layer in linear_layers(model).items()}
    adapter = merge_lora(model)
    merged = {name: np.asarray(layer.kernel[...], np.float32) for name, layer in linear_layers(model).items()}
    unmerge_lora(model, adapter)
    worst = 0.0
    for name, layer in linear_layers(model).items():
        assert layer.kernel.dtype == jnp.bfloat16
        assert (merged[name] != before[name]).any()
        step = 2.0**-8 * np.maximum(np.abs(merged[name]), np.abs(before[name]))
        worst = max(worst, (np.abs(np.asarray(layer.kernel[...], np.float32) - before[name]) / step).max())
    measured("bfloat16 weights after merging and unmerging, roundings", worst, at_most=2)


@settings(deadline=None, max_examples=20)
@given(st.sampled_from([1, 3, 9]), st.floats(-64, 64, width=32), st.integers(0, 99))
def test_the_product_is_added_to_every_layer_of_a_stack(rank, scale, seed):
    rng = np.random.default_rng(seed)
    kernel, a, b = (rng.normal(size=(2, *shape)).astype(np.float32) for shape in ((6, 4), (6, rank), (rank, 4)))
    expected = np.stack([w + scale * x.astype(np.float64) @ y for w, x, y in zip(kernel, a, b)])
    scale = jnp.float32(scale)
    np.testing.assert_allclose(add_product(*map(jnp.asarray, (kernel, a, b)), scale), expected, rtol=1e-5, atol=1e-3)
    alone = add_product(*(jnp.asarray(x[1]) for x in (kernel, a, b)), scale)
    np.testing.assert_allclose(alone, expected[1], rtol=1e-5, atol=1e-3)


def test_merging_a_stack_needs_the_memory_of_two_layers_beyond_the_stack():
    layers, d_in, d_out, rank = 16, 256, 128, 4
    shapes = (layers, d_in, d_out), (layers, d_in, rank), (layers, rank, d_out), ()
    memory = (
        add_product.lower(*(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)).compile().memory_analysis()
    )
    assert memory.alias_size_in_bytes == 4 * layers * d_in * d_out
    assert memory.temp_size_in_bytes <= 2.2 * 4 * d_in * d_out


def test_a_model_without_an_adapter_merges_to_itself():
    model = load_model(tiny_checkpoint())
    assert merge_lora(model).factors == {}


def test_dropout_needs_a_key_and_differs_between_keys(batch):
    model, still = open_adapted(dropout=0.5), open_adapted()
    fill(model), fill(still)
    first, second = jax.random.key(0), jax.random.key(1)
    np.testing.assert_array_equal(logits_of(model, batch), logits_of(still, batch))
    np.testing.assert_array_equal(logits_of(model, batch, first), logits_of(model, batch, first))
    assert (logits_of(model, batch, first) != logits_of(model, batch, second)).any()
    assert (logits_of(model, batch, first) != logits_of(still, batch)).any()


def test_dropout_drops_other_inputs_of_a_completion_than_of_its_prompt():
    tokens, hidden = 6, jax.random.normal(jax.random.key(3), (1, 6, 48))
    positions = jnp.broadcast_to(jnp.arange(tokens)[None, :, None], (1, tokens, 3))
    nowhere = jnp.zeros((1, tokens), jnp.int32)  # a prompt that no completion sees: what is left of both is the same

    def apart(key):
        model = open_adapted(dropout=0.5)
        fill(model)
        prompt, completion = model.decoder.group_forward(
            hidden, positions, nowhere, hidden[:, None], positions[:, None], key=key
        )
        return float(jnp.abs(prompt - completion[:, 0]).max())

    assert apart(None) < 1e-5
    assert apart(jax.random.key(0)) > 1e-3


def test_a_bfloat16_base_keeps_float32_adapters():
    model = open_adapted(dtype="bfloat16")
    _, trainable, frozen = split_trainable(model, lora=True, freeze_vision=False)
    assert {leaf.dtype for leaf in jax.tree.leaves(trainable)} == {jnp.dtype("float32")}
    assert {leaf.dtype for leaf in jax.tree.leaves(frozen)} == {jnp.dtype("bfloat16")}
    assert len(jax.tree.leaves(trainable)) == 2 * len(adapted(model))


def test_the_first_factor_is_uniform_within_the_bound_of_peft_and_follows_the_seed():
    one, same, other = (linear_layers(open_adapted(seed=seed)) for seed in (0, 0, 1))
    for name, layer in one.items():
        a = np.asarray(layer.lora_a[...])
        bound = a.shape[-2] ** -0.5
        assert 0.8 * bound < np.abs(a).max() <= bound
        np.testing.assert_array_equal(a, same[name].lora_a[...])
        assert (a != np.asarray(other[name].lora_a[...])).any()


def test_a_layer_and_its_gradients_equal_a_torch_transcription():
    rng = np.random.default_rng(0)
    x, w, b, a, low, upstream = (
        rng.normal(size=shape).astype(np.float32) for shape in ((5, 6), (6, 4), (4,), (6, 2), (2, 4), (5, 4))
    )
    layer = Linear(6, 4, bias=True, name="q_proj", dtype=jnp.float32, rngs=nnx.Rngs(0))
    layer.kernel[...], layer.bias[...] = jnp.asarray(w), jnp.asarray(b)
    layer.lora_a, layer.lora_b = nnx.data(LoRAParam(jnp.asarray(a))), nnx.data(LoRAParam(jnp.asarray(low)))
    layer.lora_alpha = 16.0
    graphdef, factors, rest = nnx.split(layer, LoRAParam, ...)

    def loss(factors, x):
        return jnp.sum(nnx.merge(graphdef, factors, rest)(x) * upstream)

    value, (factor_gradients, x_gradient) = jax.value_and_grad(loss, argnums=(0, 1))(factors, jnp.asarray(x))
    tensors = [torch.tensor(array, requires_grad=True) for array in (x, a, low)]
    tx, ta, tb = tensors
    expected = ((tx @ torch.tensor(w) + torch.tensor(b) + (16 / 2) * (tx @ ta @ tb)) * torch.tensor(upstream)).sum()
    expected.backward()
    np.testing.assert_allclose(value, expected.item(), rtol=1e-5)
    ours = (x_gradient, factor_gradients["lora_a"][...], factor_gradients["lora_b"][...])
    for gradient, tensor in zip(ours, tensors, strict=True):
        np.testing.assert_allclose(gradient, tensor.grad.numpy(), rtol=1e-4, atol=1e-4)


LISTED = ("q_proj", "v_proj")


@pytest.mark.parametrize(
    ("text", "targets"),
    [
        ("[q_proj, v_proj]", LISTED),
        ("all-linear", "all-linear"),
        (r"model\.language_model\.layers\.\d+\.self_attn\.(q|v)_proj", None),
        (r"(?!.*visual).*\.mlp\..*", None),
        (r"'[a-z_.]+\d+\.mlp\..*'", r"[a-z_.]+\d+\.mlp\..*"),
    ],
)
def test_targets_are_a_name_a_regex_or_a_list_in_yaml_and_on_the_command_line(text, targets, tmp_path):
    path = tmp_path / "lora.yaml"
    path.write_text(f"targets: {text}\n")
    expected = text if targets is None else targets
    for config in (load_config(LoraConfig, path), load_config(LoraConfig, None, [f"targets={text}"])):
        assert config.targets == expected
        path.write_text(config_text(config))
        assert load_config(LoraConfig, path) == config


@pytest.mark.parametrize("text", ["[]", "[q_proj, 5]", "null", "7", "(", "{a: b}", "['']"])
def test_other_targets_are_refused(text):
    with pytest.raises(InputError, match=r"^command line: .*targets: .*all-linear"):
        load_config(LoraConfig, None, [f"targets={text}"])
