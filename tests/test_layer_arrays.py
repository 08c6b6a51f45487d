"""A frozen decoder whose layers are arrays of their own: nothing is lost, nothing is held twice, no program stacks it again."""

import jax
import numpy as np
import pytest
from flax import nnx

from sif_jax.bench.workload import random_batch, random_policy
from sif_jax.models.qwen2_5_vl.layer_arrays import (
    DECODER_LAYERS,
    abstract_layers,
    are_apart,
    put_together,
    separate_layers,
    take_apart,
)
from sif_jax.training import sft
from tests.architectures import tiny_architecture
from tests.test_memory import shapes_in

LAYERS = 3
GATE = ("decoder", "layers", "mlp", "gate_proj", "kernel")


@pytest.fixture
def policy():
    """(graphdef, trainable, frozen); so few layers are always written out."""
    return random_policy(tiny_architecture(layers=LAYERS), dtype="float32")


def arrays(state: nnx.State) -> dict:
    return {path: leaf.get_value() for path, leaf in nnx.to_flat_state(state)}


def test_put_together_gives_back_every_array_and_each_form_is_used_up(policy):
    frozen = policy[2]
    before = {path: np.array(x) for path, x in arrays(frozen).items()}
    stack = arrays(frozen)[GATE]
    apart = take_apart(frozen)
    assert stack.is_deleted(), "the weights are not held twice"
    assert len(apart.layers) == LAYERS
    part = arrays(apart.layers[1])[GATE[len(DECODER_LAYERS) :]]
    np.testing.assert_array_equal(part, before[GATE][1])
    after = arrays(put_together(apart))
    assert part.is_deleted()
    assert after.keys() == before.keys()
    for path, value in before.items():
        np.testing.assert_array_equal(after[path], value, err_msg=str(path))


def test_a_state_without_frozen_layers_stays_as_it_is():
    _, _, frozen = random_policy(tiny_architecture(), dtype="float32", lora_rank=None)
    apart = take_apart(frozen)
    assert apart.layers == ()
    assert not are_apart((apart,))
    assert arrays(put_together(apart)).keys() == arrays(frozen).keys()


def test_gradients_are_those_of_the_stack_and_no_program_stacks_the_layers_again(policy):
    graphdef, trainable, frozen = policy
    config = tiny_architecture(layers=LAYERS)
    batch = random_batch(config, rows=2, tokens=64, image_px=(56, 56))
    add, key = sft.make_gradients(graphdef, dropout=False), jax.random.key(0)
    whole = (LAYERS, config.text.hidden_size, config.text.intermediate_size)
    assert whole in shapes_in(add.lower(None, trainable, frozen, batch, key).compile())
    expected, sums = add(None, trainable, frozen, batch, key)
    shapes = abstract_layers(frozen)
    apart = take_apart(frozen)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), shapes) == jax.tree.map(lambda x: (x.shape, x.dtype), apart)
    assert whole not in shapes_in(add.lower(None, trainable, shapes, batch, key).compile())
    gradients, others = add(None, trainable, apart, batch, key)
    jax.tree.map(np.testing.assert_array_equal, (gradients, others), (expected, sums))


def test_a_rollout_decodes_from_the_weights_as_they_lie_and_copies_adapters_alone(policy):
    _, trainable, frozen = policy
    expected = separate_layers((trainable, frozen))
    values = [{path: np.array(x) for path, x in arrays(layer).items()} for layer in expected]
    apart = take_apart(frozen)
    assert are_apart((trainable, apart))
    layers = separate_layers((trainable, apart))
    for layer, held, value in zip(layers, apart.layers, values, strict=True):
        found = arrays(layer)
        assert found.keys() == value.keys() > arrays(held).keys()
        assert all(found[path] is x for path, x in arrays(held).items()), "no second copy of the weights"
        for path, x in found.items():
            np.testing.assert_array_equal(x, value[path], err_msg=str(path))
