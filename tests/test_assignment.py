"""The batched assignment: SciPy's totals, for every shape, on ties and on zeros."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy.optimize import linear_sum_assignment

from sif_jax.rewards.assignment import best_total, optimal_assignment

best_total_jitted, assign = jax.jit(best_total), jax.jit(optimal_assignment)


def scipy_totals(weights):
    return np.array([problem[linear_sum_assignment(problem, maximize=True)].sum() for problem in weights])


def totals_of(weights, columns):
    return np.take_along_axis(weights, columns[..., None], axis=2).sum(axis=(1, 2))


def sparse_weights(rng, batch, n, m):
    """As of boxes: most pairs do not overlap at all, and some weights are equal."""
    weights = np.round(rng.random((batch, n, m)), 1) * (rng.random((batch, n, m)) < rng.random((batch, 1, 1)))
    return weights.astype(np.float32)


def test_the_optimum_is_found_where_greedy_fails():
    weights = jnp.array([[[0.9, 0.8], [0.8, 0.1]]])
    assert best_total_jitted(weights)[0] == pytest.approx(1.6)
    np.testing.assert_array_equal(assign(weights), [[1, 0]])


@pytest.mark.parametrize("shape", [(1, 1), (2, 5), (8, 8), (8, 20), (32, 32)])
@pytest.mark.parametrize("kind", ["dense", "sparse"])
def test_totals_are_those_of_scipy_and_no_column_is_taken_twice(shape, kind):
    rng = np.random.default_rng(0)
    make = sparse_weights if kind == "sparse" else lambda rng, *shape: rng.random(shape, np.float32)
    weights = make(rng, 200, *shape)
    columns = np.asarray(assign(weights))
    assert all(len(set(row)) == shape[0] for row in columns.tolist())
    expected = scipy_totals(weights.astype(np.float64))
    np.testing.assert_allclose(totals_of(weights.astype(np.float64), columns), expected, atol=1e-6 * shape[0])
    np.testing.assert_allclose(best_total_jitted(weights), expected, atol=1e-6 * shape[0])


@settings(deadline=None, max_examples=60)
@given(hnp.arrays(np.float32, (3, 5, 6), elements=st.sampled_from([0.0, 0.25, 0.5, 1.0])))
def test_sets_of_columns_and_shortest_paths_agree_on_ties(weights):
    expected = scipy_totals(weights)
    np.testing.assert_array_equal(totals_of(weights, np.asarray(assign(weights))), expected)
    np.testing.assert_array_equal(best_total_jitted(weights), expected)


def test_more_rows_than_columns_are_refused():
    with pytest.raises(ValueError, match="at most as many rows as columns, got 3 x 2"):
        optimal_assignment(jnp.zeros((1, 3, 2)))
