"""Programs with collectives that are known by hand, compiled for eight devices (a script; prints JSON lines)."""

import json
import sys

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from sif_jax.plan.collectives import collectives
from sif_jax.plan.hlo import Program
from sif_jax.plan.topology import devices_of, parse_topology, set_environment

DEVICES, ROWS, WIDTH, TURNS = 8, 16, 256, 5
SHARD = ROWS * WIDTH * 4  # bytes of float32 on one device


def gathered(x):
    """All rows, five times: each turn needs the one before."""

    def turn(x, _):
        whole = jax.lax.all_gather(x, "x", tiled=True)
        return jnp.tanh(x + whole.reshape(DEVICES, ROWS, WIDTH).max(0)), None

    return jax.lax.scan(turn, x, length=TURNS)[0]


def reduced(x):
    return jax.lax.psum(x, "x") * x


def scattered(x):
    return jax.lax.psum_scatter(x, "x", tiled=True)


def exchanged(x):
    return jax.lax.all_to_all(x, "x", split_axis=1, concat_axis=0, tiled=True)


def passed_on(x):
    def turn(x, _):
        return jnp.tanh(jax.lax.ppermute(x, "x", [(i, (i + 1) % DEVICES) for i in range(DEVICES)])), None

    return jax.lax.scan(turn, x, length=TURNS)[0]


def until_large(x):
    """A loop whose length follows from the data, 5 turns at most."""

    def going(carry):
        turn, x = carry
        return (turn < TURNS) & (x.max() < 100.0)

    return jax.lax.while_loop(going, lambda carry: (carry[0] + 1, jax.lax.psum(carry[1], "x") + 1.0), (0, x))[1]


PROGRAMS = (gathered, reduced, scattered, exchanged, passed_on, until_large)


def compiled(function, mesh):
    rows = PartitionSpec("x")
    program = jax.jit(jax.shard_map(function, mesh=mesh, in_specs=rows, out_specs=rows, check_vma=False))
    x = jax.ShapeDtypeStruct((DEVICES * ROWS, WIDTH), jnp.float32, sharding=NamedSharding(mesh, rows))
    return program.lower(x).compile()


def main() -> None:
    if sys.argv[1] == "cpu":
        devices = jax.devices()
    else:
        set_environment()
        devices = devices_of(parse_topology(sys.argv[1]))
    assert len(devices) == DEVICES
    mesh = Mesh(devices, ("x",), axis_types=(AxisType.Auto,))
    for function in PROGRAMS:
        text = compiled(function, mesh).as_text()
        found = collectives(Program(text), devices=DEVICES)
        print(json.dumps([function.__name__, {kind: list(each) for kind, each in found.items()}]), flush=True)


if __name__ == "__main__":
    main()
