"""The optimizer: schedules by hand and against transformers, one AdamW step by hand, float32 moments."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import get_scheduler

from sif_jax.config import OptimizerConfig
from sif_jax.training.optimizer import decay_mask, learning_rate, make_optimizer


def rates(config: OptimizerConfig, total_steps: int, steps: int) -> list[float]:
    schedule = learning_rate(config, total_steps)
    return [float(schedule(step)) for step in range(steps)]


def test_the_cosine_schedule_by_hand():
    config = OptimizerConfig(learning_rate=1.0, schedule="cosine", warmup_ratio=0.2, min_lr_ratio=0.1)
    # 2 warm-up steps of 10, then 0.1 + 0.9 (1 + cos(pi k / 8)) / 2; k = 4 is the middle.
    got = rates(config, 10, 12)
    np.testing.assert_allclose(
        [got[0], got[1], got[2], got[6], got[10], got[11]], [0, 0.5, 1, 0.55, 0.1, 0.1], atol=1e-6
    )


def test_the_linear_and_the_constant_schedule_by_hand():
    linear = OptimizerConfig(learning_rate=2.0, schedule="linear", warmup_ratio=0.5)
    np.testing.assert_allclose(rates(linear, 4, 6), [0, 1, 2, 1, 0, 0], atol=1e-6)
    constant = OptimizerConfig(learning_rate=2.0, schedule="constant")
    assert rates(constant, 4, 5) == [2.0] * 5


@pytest.mark.parametrize(
    ("ours", "theirs"), [("cosine", "cosine"), ("linear", "linear"), ("constant", "constant_with_warmup")]
)
def test_the_schedules_are_those_of_transformers(ours, theirs):
    config = OptimizerConfig(learning_rate=3e-4, schedule=ours, warmup_ratio=0.1)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=3e-4)
    scheduler = get_scheduler(theirs, optimizer, num_warmup_steps=4, num_training_steps=37)
    expected = []
    for _ in range(37):
        expected.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    np.testing.assert_allclose(rates(config, 37, 37), expected, rtol=1e-5, atol=1e-10)


@given(
    schedule=st.sampled_from(["cosine", "linear", "constant"]),
    warmup=st.floats(0, 0.99),
    floor=st.floats(0, 1),
    total=st.integers(1, 1000),
    step=st.integers(0, 2000),
)
@settings(deadline=None, max_examples=50)
def test_a_rate_is_between_zero_and_the_peak(schedule, warmup, floor, total, step):
    config = OptimizerConfig(learning_rate=0.5, schedule=schedule, warmup_ratio=warmup, min_lr_ratio=floor)
    assert 0 <= float(learning_rate(config, total)(step)) <= 0.5 * (1 + 1e-6)


def test_the_steps_are_those_of_torch_adamw():
    config = OptimizerConfig(
        learning_rate=0.01, schedule="constant", weight_decay=0.1, b1=0.8, b2=0.95, eps=1e-6, max_grad_norm=0.5
    )
    start = np.linspace(-1, 1, 6, dtype=np.float32).reshape(2, 3)
    grads = np.random.default_rng(0).normal(size=(5, 2, 3)).astype(np.float32)
    theirs = torch.nn.Parameter(torch.tensor(start))
    adamw = torch.optim.AdamW([theirs], lr=0.01, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.1)
    optimizer = make_optimizer(config, total_steps=5)
    ours = {"kernel": jnp.asarray(start)}
    state = optimizer.init(ours)
    for grad in grads:
        theirs.grad = torch.tensor(grad)
        torch.nn.utils.clip_grad_norm_([theirs], 0.5)
        adamw.step()
        updates, state = optimizer.update({"kernel": jnp.asarray(grad)}, state, ours)
        ours = optax.apply_updates(ours, updates)
    # torch adds 1e-6 to the norm that it clips by
    np.testing.assert_allclose(ours["kernel"], theirs.detach().numpy(), rtol=1e-5, atol=1e-6)


def test_biases_and_scales_do_not_decay_even_when_layers_are_stacked():
    model = nnx.Dict(
        dense=nnx.Linear(3, 4, rngs=nnx.Rngs(0)),
        norm=nnx.Dict(scale=nnx.Param(jnp.ones((7, 4)))),
        free=nnx.Param(jnp.ones(5)),
    )
    mask = nnx.to_pure_dict(decay_mask(nnx.state(model)))
    assert mask == {"dense": {"kernel": True, "bias": False}, "norm": {"scale": False}, "free": False}


def test_weight_decay_shrinks_kernels_alone():
    config = OptimizerConfig(learning_rate=0.1, schedule="constant", weight_decay=0.5)
    params = {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}
    optimizer = make_optimizer(config, 1)
    updates, _ = optimizer.update(jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params)
    np.testing.assert_allclose(updates["kernel"], -0.05, rtol=1e-6)
    np.testing.assert_array_equal(updates["bias"], 0)


def test_moments_of_bfloat16_parameters_are_float32_and_stay_so():
    optimizer = make_optimizer(OptimizerConfig(learning_rate=1e-3), 10)
    params = {"kernel": jnp.ones((2, 2), jnp.bfloat16)}
    before = optimizer.init(params)
    updates, after = jax.jit(optimizer.update)(params, before, params)
    assert updates["kernel"].dtype == jnp.float32
    assert jax.tree.map(lambda leaf: leaf.dtype, before) == jax.tree.map(lambda leaf: leaf.dtype, after)
    assert {leaf.dtype for leaf in jax.tree.leaves(after) if leaf.ndim} == {jnp.dtype("float32")}


@pytest.mark.parametrize(("norm", "shrunk"), [(1.0, 1 / 300), (None, 1.0)])
def test_the_gradients_global_norm_is_clipped_unless_it_is_null(norm, shrunk):
    optimizer = make_optimizer(OptimizerConfig(learning_rate=1.0, b1=0.0, max_grad_norm=norm), 1)
    grads = {"a": jnp.full((3, 3), 60.0), "b": jnp.full((4, 4), 60.0)}  # 25 entries of 60: the norm is 300
    _, state = optimizer.update(grads, optimizer.init(grads), grads)
    # with b1 = 0 the first moment is the clipped gradient
    np.testing.assert_allclose(optax.tree.get(state, "mu")["b"], 60.0 * shrunk, rtol=1e-6)
