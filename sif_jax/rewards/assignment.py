"""Optimal assignment of a whole batch at once: every step is one array operation over all its problems (pure).

Up to eight columns, dynamic programming over the sets of columns in use (Held-Karp), which is three times as fast
there. Beyond, shortest augmenting paths (Jonker-Volgenant, as in SciPy's `linear_sum_assignment`; Crouse 2016), one row
of every problem after the other.
"""

from __future__ import annotations

import functools
import itertools
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

_MOST_COLUMNS_IN_SETS = 8


def best_total(weights: Float[Array, "batch n m"]) -> Float[Array, "batch"]:
    """The largest total weight of a one-to-one assignment of all rows; needs n <= m."""
    if weights.shape[2] <= _MOST_COLUMNS_IN_SETS:
        return _best_total_over_sets(jnp.moveaxis(weights, 0, -1))
    return jnp.take_along_axis(weights, optimal_assignment(weights)[..., None], axis=2).sum(axis=(1, 2))


def _best_total_over_sets(weights: Float[Array, "n m batch"]) -> Float[Array, "batch"]:
    """Row after row, the best total of the rows so far for every set of as many columns."""
    n, m, batch = weights.shape
    best, sets = jnp.zeros((1, batch)), [frozenset[int]()]
    for row in range(n):
        number = {columns: index for index, columns in enumerate(sets)}
        sets = [frozenset(columns) for columns in itertools.combinations(range(m), row + 1)]
        last = np.array([sorted(columns) for columns in sets])
        rest = np.array([[number[columns - {column}] for column in sorted(columns)] for columns in sets])
        best = functools.reduce(jnp.maximum, (best[rest[:, k]] + weights[row, last[:, k]] for k in range(row + 1)))
    return best.max(axis=0)


def optimal_assignment(weights: Float[Array, "batch n m"]) -> Int[Array, "batch n"]:
    """The column of each row in a one-to-one assignment with the largest total weight; needs n <= m."""
    _, n, m = weights.shape
    if n > m:
        raise ValueError(f"expected at most as many rows as columns, got {n} x {m}")
    cost = -jnp.moveaxis(weights, 0, -1)
    row_of = lax.fori_loop(0, n, lambda row, state: _add_row(cost, row, *state), _unassigned(m, cost.shape[-1]))[1]
    return (row_of[None] == jnp.arange(n)[:, None, None]).argmax(axis=1).T


def _unassigned(m: int, batch: int) -> tuple[Float[Array, "m batch"], Int[Array, "m batch"]]:
    """The columns' prices, and the row of each column, -1 where it is free."""
    return jnp.zeros((m, batch)), jnp.full((m, batch), -1)


class _Search(NamedTuple):
    """Dijkstra's state, per problem: `row` is scanned next, reached through the column `through`."""

    distance: Float[Array, "m batch"]
    previous: Int[Array, "m batch"]  # column; -1: the row that is added
    settled: Bool[Array, "m batch"]
    row: Int[Array, " batch"]
    through: Int[Array, " batch"]
    offset: Float[Array, " batch"]  # distance of `row` less its price
    end: Int[Array, " batch"]  # the free column that was reached; -1: none yet


def _add_row(
    cost: Float[Array, "n m batch"], row: Int[Array, ""], prices: Float[Array, "m batch"], row_of: Int[Array, "m batch"]
) -> tuple[Float[Array, "m batch"], Int[Array, "m batch"]]:
    m, batch = prices.shape
    none = jnp.full(batch, -1)
    search = _Search(
        jnp.full((m, batch), jnp.inf),
        jnp.full((m, batch), -1),
        jnp.zeros((m, batch), bool),
        jnp.full(batch, row),
        none,
        jnp.zeros(batch),
        none,
    )
    search = lax.while_loop(
        lambda search: (search.end < 0).any(), lambda search: _settle_one(cost, prices, row_of, search), search
    )
    shortest = _at(search.distance, search.end)
    prices += jnp.where(search.settled, search.distance - shortest[None], 0)
    return prices, _augment(row_of, search, row)


def _settle_one(
    cost: Float[Array, "n m batch"], prices: Float[Array, "m batch"], row_of: Int[Array, "m batch"], search: _Search
) -> _Search:
    """Scan one row of each problem, and settle its nearest open column."""
    reduced = jnp.take_along_axis(cost, search.row[None, None], axis=0)[0] - prices + search.offset[None]
    nearer = (reduced < search.distance) & ~search.settled
    distance = jnp.where(nearer, reduced, search.distance)
    previous = jnp.where(nearer, search.through[None], search.previous)
    open_distance = jnp.where(search.settled, jnp.inf, distance)
    nearest, shortest = open_distance.argmin(axis=0), open_distance.min(axis=0)
    owner = _at(row_of, nearest)
    searching = search.end < 0
    goes_on = searching & (owner >= 0)
    row = jnp.where(goes_on, owner, search.row)
    # An assigned pair is tight, so a row's price is its column's cost less the column's price.
    row_price = cost[row, nearest, jnp.arange(len(row))] - _at(prices, nearest)
    return _Search(
        jnp.where(searching[None], distance, search.distance),
        jnp.where(searching[None], previous, search.previous),
        search.settled | ((jnp.arange(len(prices))[:, None] == nearest[None]) & goes_on[None]),
        row,
        jnp.where(goes_on, nearest, search.through),
        jnp.where(goes_on, shortest - row_price, search.offset),
        jnp.where(searching & (owner < 0), nearest, search.end),
    )


def _augment(row_of: Int[Array, "m batch"], search: _Search, row: Int[Array, ""]) -> Int[Array, "m batch"]:
    """Walk each path back from its end: every column takes the row of the column before it, the first one `row`."""

    def shift(state: tuple[Array, Array]) -> tuple[Array, Array]:
        row_of, column = state
        before = jnp.where(column >= 0, _at(search.previous, column), -1)
        moved = jnp.where(before >= 0, _at(row_of, before), row)
        return jnp.where(jnp.arange(len(row_of))[:, None] == column[None], moved[None], row_of), before

    return lax.while_loop(lambda state: (state[1] >= 0).any(), shift, (row_of, search.end))[0]


def _at(values: Array, column: Int[Array, " batch"]) -> Array:
    """Each problem's value at its column, 0 at column -1."""
    return jnp.where(jnp.arange(len(values))[:, None] == column[None], values, 0).sum(axis=0)
