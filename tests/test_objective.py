"""The GRPO objective against an independent torch transcription, and its edges."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sif_jax.training.objective import PolicyLoss, grpo_loss


def random_arrays(seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    prompts, samples, length = 2, 3, 5
    lengths = rng.integers(0, length + 1, (prompts, samples))
    old = rng.normal(-1.5, 0.5, (prompts, samples, length)).astype(np.float32)
    return {
        "logprobs": old + rng.normal(0, 0.3, old.shape).astype(np.float32),
        "old_logprobs": old,
        "reference_logprobs": old + rng.normal(0, 0.3, old.shape).astype(np.float32),
        "advantages": rng.normal(0, 1, (prompts, samples)).astype(np.float32),
        "token_mask": np.arange(length) < lengths[..., None],
        "valid": rng.random((prompts, samples)) < 0.8,
    }


def loss_of(arrays: dict[str, np.ndarray], *, kl_beta: float = 0.04, **changed: jax.Array) -> PolicyLoss:
    return grpo_loss(**{**jax.tree.map(jnp.asarray, arrays), **changed}, clip_eps=0.2, kl_beta=kl_beta)


def torch_loss(arrays: dict[str, np.ndarray], logprobs: torch.Tensor, clip_eps: float, kl_beta: float) -> torch.Tensor:
    """Completion by completion, token by token, as the formula is printed in the paper."""
    total = torch.zeros(())
    for p, m in np.ndindex(arrays["advantages"].shape):
        length = int(arrays["token_mask"][p, m].sum())
        if not arrays["valid"][p, m] or length == 0:
            continue
        gain = float(arrays["advantages"][p, m])
        tokens = []
        for t in range(length):
            ratio = torch.exp(logprobs[p, m, t] - float(arrays["old_logprobs"][p, m, t]))
            log_ratio = float(arrays["reference_logprobs"][p, m, t]) - logprobs[p, m, t]
            kl = torch.exp(log_ratio) - log_ratio - 1
            tokens.append(torch.minimum(ratio * gain, ratio.clamp(1 - clip_eps, 1 + clip_eps) * gain) - kl_beta * kl)
        total = total - torch.stack(tokens).mean()
    return total


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 10_000))
def test_loss_and_gradient_equal_an_independent_transcription(seed):
    arrays = random_arrays(seed)
    logprobs = torch.tensor(arrays["logprobs"], requires_grad=True)
    expected = torch_loss(arrays, logprobs, 0.2, 0.04)
    (gradient,) = torch.autograd.grad(expected, logprobs, allow_unused=True) if expected.requires_grad else (None,)

    def ours(values):
        return loss_of(arrays, logprobs=values).loss

    loss, ours_gradient = jax.value_and_grad(ours)(jnp.asarray(arrays["logprobs"]))
    np.testing.assert_allclose(loss, expected.detach().numpy(), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(ours_gradient, 0 if gradient is None else gradient.numpy(), rtol=1e-4, atol=1e-6)


def test_with_one_update_per_rollout_the_ratio_is_one_and_the_gradient_is_the_policy_gradient():
    arrays = random_arrays(3)
    arrays["valid"][:] = True
    arrays["token_mask"][:] = True

    def ours(values):
        return loss_of(arrays, kl_beta=0.0, logprobs=values, old_logprobs=jax.lax.stop_gradient(values)).loss

    loss, gradient = jax.value_and_grad(ours)(jnp.asarray(arrays["logprobs"]))
    np.testing.assert_allclose(loss, -arrays["advantages"].sum(), rtol=1e-5)
    np.testing.assert_allclose(gradient, np.repeat(-arrays["advantages"][..., None] / 5, 5, axis=-1), rtol=1e-5)


def test_a_masked_completion_adds_nothing_even_when_its_numbers_are_wild():
    arrays = random_arrays(4)
    arrays["valid"][:] = True
    arrays["valid"][0, 1] = False
    calm = loss_of(arrays)
    arrays["advantages"][0, 1] = 1e6
    wild = loss_of(arrays)
    assert float(calm.loss) == float(wild.loss)
    assert float(calm.completions) == 5


@pytest.mark.parametrize(("gain", "log_ratio", "clipped"), [(1, 0.5, 1), (1, -0.5, 0), (-1, -0.5, 1), (-1, 0.5, 0)])
def test_only_a_step_that_went_too_far_in_its_favour_is_clipped(gain, log_ratio, clipped):
    zeros = np.zeros((1, 1, 1), np.float32)
    arrays = {
        "logprobs": zeros + np.float32(log_ratio),
        "old_logprobs": zeros,
        "reference_logprobs": zeros,
        "advantages": np.full((1, 1), gain, np.float32),
        "token_mask": zeros == 0,
        "valid": np.ones((1, 1), bool),
    }
    assert float(loss_of(arrays).clipped) == clipped
