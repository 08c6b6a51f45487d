"""Group-relative advantages: standardised within the group, silent where there is no signal."""

import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from sif_jax.rewards import group_advantages

NAN = float("nan")


def advantages(rewards, valid=None, eps=0.0):
    rewards = jnp.asarray(rewards, jnp.float32)
    valid = jnp.ones(rewards.shape, bool) if valid is None else jnp.asarray(valid)
    return np.asarray(group_advantages(rewards, valid, eps=eps))


def test_a_group_is_standardised_by_its_own_mean_and_deviation():
    np.testing.assert_allclose(advantages([[0, 2], [10, 30]]), [[-1, 1], [-1, 1]])


def test_eps_is_added_to_the_deviation():
    np.testing.assert_allclose(advantages([[0, 2]], eps=1.0), [[-0.5, 0.5]])


def test_equal_rewards_carry_no_signal():
    np.testing.assert_array_equal(advantages([[0.1] * 7, [2.7] * 7]), np.zeros((2, 7)))


def test_a_failed_judgement_leaves_the_statistics():
    masked = advantages([[0, 2, 100, NAN]], [[True, True, False, False]])
    np.testing.assert_allclose(masked, [[-1, 1, 0, 0]])


def test_fewer_than_two_valid_completions_carry_no_signal():
    rewards, valid = [[5, 1, 1], [NAN] * 3], [[True, False, False], [False] * 3]
    np.testing.assert_array_equal(advantages(rewards, valid), np.zeros((2, 3)))


@settings(deadline=None, max_examples=40)
@given(hnp.arrays(np.float32, (3, 4), elements=st.integers(-16, 48).map(lambda n: n / 16)), hnp.arrays(bool, (3, 4)))
def test_every_group_is_that_of_numpy(rewards, valid):
    actual = advantages(rewards, valid)
    for group, is_valid, values in zip(rewards.astype(np.float64), valid, actual):
        kept = group[is_valid]
        expected = np.zeros(4)
        if kept.size and np.ptp(kept) > 0:
            expected[is_valid] = (kept - kept.mean()) / kept.std()
        np.testing.assert_allclose(values, expected, atol=2e-5)
