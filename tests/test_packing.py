"""Completions without their padding: tokens move into lanes and back, and a policy says and learns the same of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from sif_jax.bench.workload import random_batch
from sif_jax.config import LoraConfig
from sif_jax.models.qwen2_5_vl.lora import add_lora, split_trainable
from sif_jax.models.qwen2_5_vl.model import Qwen2_5_VL
from sif_jax.ops.packing import SIZES, Packing, lanes, pack
from sif_jax.training.policy import completion_logprobs
from tests.architectures import tiny_architecture


@settings(deadline=None, max_examples=12)
@given(
    shape=st.sampled_from([(1, 4, 2), (4, 3, 4), (2, 8, 4), (3, 2, 1)]),  # prompts, samples, lanes
    length=st.integers(1, 20),
    seed=st.integers(0, 2**32 - 1),
)
def test_every_token_has_one_slot_and_comes_back_from_it(shape, length, seed):
    (prompts, samples, count), rng = shape, np.random.default_rng(seed)
    mask = np.arange(length) < rng.integers(0, length + 1, (prompts, samples, 1))
    packed = pack(lanes(mask, count))
    most = lanes(mask, count).sum(1).max()
    if packed is None:
        assert most > (SIZES - 1) * (mask.size // count // SIZES)
        return
    packing = Packing(*map(jnp.asarray, packed))
    assert most <= packing.slots.shape[1] < mask.size // count
    x = jnp.asarray(rng.normal(size=(*mask.shape, 2, 3)), jnp.float32)
    packed = packing.packed(x)
    assert packed.shape == (*packing.slots.shape, 2, 3)
    np.testing.assert_array_equal(packing.padded(packed, mask.shape), jnp.where(mask[..., None, None], x, 0))
    np.testing.assert_allclose(packed.sum(), np.asarray(x)[mask].sum(), atol=1e-3)


def test_lanes_are_the_devices_prompts_or_else_their_samples_in_the_order_in_which_the_mesh_holds_them():
    numbers = np.arange(2 * 4).reshape(2, 4, 1)
    np.testing.assert_array_equal(lanes(numbers, 2), [[0, 1, 2, 3], [4, 5, 6, 7]])
    np.testing.assert_array_equal(lanes(numbers, 4), [[0, 4], [1, 5], [2, 6], [3, 7]])


def test_sizes_are_few():
    found = {packed[0].shape[1] for tokens in range(800) if (packed := pack(np.arange(800)[None] < tokens))}
    assert found == {100, 200, 300, 400, 500, 600, 700}
    assert pack(np.arange(800)[None] < 701) is None


def policy(dropout: float, attention="xla"):
    model = Qwen2_5_VL(tiny_architecture(), param_dtype=jnp.float32, attention=attention, rngs=nnx.Rngs(params=0))
    lora = LoraConfig(rank=4).model_dump() | {"dropout": dropout}
    add_lora(model, **lora, freeze_vision=True, rngs=nnx.Rngs(1))
    graphdef, trainable, frozen = split_trainable(model, lora=True, freeze_vision=True)
    return graphdef, jax.tree.map(lambda x: x + 0.02, trainable), frozen


@pytest.mark.parametrize(
    ("attention", "dropout", "remat", "counts"),
    [
        ("xla", 0.0, "none", (1, 4)),
        ("xla", 0.3, "dots", (2,)),
        pytest.param("splash", 0.0, "none", (2,), marks=pytest.mark.slow),
    ],
)
def test_log_probabilities_and_gradients_are_those_of_padded_completions(attention, dropout, remat, counts, measured):
    graphdef, trainable, frozen = policy(dropout, attention)
    batch = jax.tree.map(jnp.asarray, random_batch(tiny_architecture(), rows=2, tokens=64, image_px=(56, 56)))
    rng, shape = np.random.default_rng(0), (2, 4, 12)
    ids = jnp.asarray(rng.integers(0, 400, shape), jnp.int32)
    lengths = np.array([[12, 1, 3, 0], [2, 7, 12, 5]])
    mask = np.arange(12) < lengths[..., None]
    weights = jnp.asarray(rng.normal(size=shape), jnp.float32)

    @jax.jit
    def learn(trainable, packing):
        def loss(trainable):
            model = nnx.merge(graphdef, trainable, frozen, copy=True)
            model.remat = remat
            logprobs, entropy = completion_logprobs(
                model, batch, None, ids, jnp.asarray(mask), temperature=0.8, packing=packing, key=jax.random.key(3)
            )
            told = jnp.where(mask, jnp.stack([logprobs, entropy]), 0)
            return jnp.sum(told[0] * weights), told

        (_, told), gradients = jax.value_and_grad(loss, has_aux=True)(trainable)
        return told, gradients

    padded = learn(trainable, None)
    for count in counts:
        packed = pack(lanes(mask, count))
        assert packed is not None
        packing = Packing(*map(jnp.asarray, packed))
        pairs = zip(jax.tree.leaves(learn(trainable, packing)), jax.tree.leaves(padded), strict=True)
        error = max(float(jnp.abs(a - b).max() / jnp.maximum(jnp.abs(b).max(), 1e-3)) for a, b in pairs)
        measured(f"packed completions in {count} lanes, against padded ones, relative", error, at_most=2e-5)
