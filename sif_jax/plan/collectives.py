"""What a compiled program sends from device to device: each collective by kind, with bytes (pure).

Bytes are what one device has to send at least, as rings do: of n devices that gather arrays of S bytes, each sends S n - 1 times;
reducing is the reverse; an all-reduce is both.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from math import prod
from typing import NamedTuple

from sif_jax.plan.hlo import Computation, Instruction, Program

# Bytes that a device sends, over the bytes of its operands, in a group of n.
SENT = {
    "all-gather": lambda n: n - 1,
    "all-reduce": lambda n: 2 * (n - 1) / n,
    "reduce-scatter": lambda n: (n - 1) / n,
    "all-to-all": lambda n: (n - 1) / n,
    "ragged-all-to-all": lambda n: (n - 1) / n,
    "collective-permute": lambda n: 1,
    "collective-broadcast": lambda n: 1,
}


class Traffic(NamedTuple):
    count: float  # how often, in one run of the program
    nbytes: float  # sent by a device in all of them


class _Found(NamedTuple):
    key: tuple[str, str]
    kind: str
    nbytes: float
    times: float


def collectives(program: Program, *, devices: int, unknown: int = 1) -> dict[str, Traffic]:
    """By kind. A loop whose length is not in the program counts `unknown` times.

    One collective may stand in the text several times: its start, its end, and on TPUs the fusions between them that go on
    with it, which loops inside may repeat. They share a channel; the fewest runs of them are the collective's own.
    """
    runs = program.runs(unknown)
    once: dict[tuple[str, str], _Found] = {}
    for name, computation in program.computations.items():
        for found in _collectives_in(computation, runs[name], devices):
            earlier = once.get(found.key)
            if runs[name] and (earlier is None or found.times < earlier.times):
                once[found.key] = found
    sums: dict[str, Traffic] = {}
    for each in once.values():
        count, nbytes = sums.get(each.kind, Traffic(0, 0))
        sums[each.kind] = Traffic(count + each.times, nbytes + each.times * each.nbytes)
    return dict(sorted(sums.items()))


def total_bytes(traffic: Mapping[str, Traffic]) -> float:
    return sum((each.nbytes for each in traffic.values()), 0.0)


def _collectives_in(computation: Computation, times: float, devices: int) -> Iterator[_Found]:
    for each in computation.instructions.values():
        kind = each.opcode.removesuffix("-start")
        if kind in SENT:
            group = group_size(each, devices)
            operands = (computation.instructions[name] for name in each.operands)
            nbytes = SENT[kind](group) * sum(operand.nbytes for operand in operands) if group > 1 else 0
            channel = each.attribute(r"channel_id=(\d+)")
            key = (kind, channel) if channel else (kind, f"{computation.name} {each.name}")
            yield _Found(key, kind, nbytes, times)


def group_size(instruction: Instruction, devices: int) -> int:
    """How many devices take part together: from a list, from `[groups,size]<=[…]`, or from the axes of a mesh.

    Raises:
      ValueError: it is written in another way.
    """
    if instruction.opcode.startswith("collective-"):
        return 2  # pairs
    if mesh := re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\S+)? \{([^}]*)\}", instruction.attributes):
        sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", mesh.group(1))}
        parts = re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", mesh.group(2))
        return prod(int(part) if part else sizes[name] for name, part in parts)
    if iota := re.search(r"replica_groups=\[\d+,(\d+)\]<=", instruction.attributes):
        return int(iota.group(1))
    if listed := re.search(r"replica_groups=\{\{([\d,\s]*)\}", instruction.attributes):
        return len([number for number in listed.group(1).split(",") if number.strip()])
    if told := re.search(r"replica_groups=(?!\{\}).{,80}", instruction.attributes):
        raise ValueError(f"cannot read the group of {instruction.name}: {told.group()}")
    return devices
