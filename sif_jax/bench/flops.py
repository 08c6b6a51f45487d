"""Matrix-product FLOPs of a traced program on all its devices, loops counted as often as they run (pure).

XLA's own cost analysis counts the body of a loop once, so it cannot compare remat policies of scanned layers. It sees nothing of
the inside of a Pallas kernel.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from typing import Any

from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn


def matmul_flops(jaxpr: Jaxpr, turns: int = 1) -> int:
    """Two per multiplication and addition; of a conditional's branches the costliest, of a while loop `turns`."""
    return sum(_equation_flops(equation, turns) for equation in jaxpr.eqns)


def _equation_flops(equation: JaxprEqn, turns: int) -> int:
    if equation.primitive.name == "dot_general":
        (contracting, _), _ = equation.params["dimension_numbers"]
        left: Any = equation.invars[0].aval
        output: Any = equation.outvars[0].aval
        return 2 * prod(output.shape) * prod(left.shape[axis] for axis in contracting)
    inner = [matmul_flops(jaxpr, turns) for value in equation.params.values() for jaxpr in _jaxprs(value)]
    if equation.primitive.name == "cond":
        return max(inner)
    return sum(inner) * _times(equation, turns)


def _times(equation: JaxprEqn, turns: int) -> int:
    """How often what is inside runs: a loop's turns, the cells of a kernel's grid, the devices that each do their part."""
    match equation.primitive.name:
        case "scan":
            return equation.params["length"]
        case "while":
            return turns
        case "pallas_call":
            return prod(equation.params["grid_mapping"].grid)
        case "shard_map":
            return equation.params["mesh"].size  # ours go over the whole mesh
    return 1


def _jaxprs(value: Any) -> Iterator[Jaxpr]:
    if isinstance(value, ClosedJaxpr):
        yield value.jaxpr
    elif isinstance(value, Jaxpr):
        yield value
    elif isinstance(value, tuple | list):
        for part in value:
            yield from _jaxprs(part)
