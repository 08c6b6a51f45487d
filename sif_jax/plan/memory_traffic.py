"""Bytes that a compiled program reads from and writes to the main memory of a device, loops counted as they turn (pure).

Each instruction reads its operands and writes its result; a fusion is one instruction. Of an array that is only sliced or updated
in place, the slice counts. What lies in a TPU's vector memory does not count, nor do collectives, whose own figures say more.
"""

from __future__ import annotations

from collections.abc import Iterator

from sif_jax.plan.collectives import SENT
from sif_jax.plan.hlo import Computation, Instruction, Program

FREE = {
    "parameter",
    "constant",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "while",
    "conditional",
    "call",
    "after-all",
    "partition-id",
    "replica-id",
    "optimization-barrier",
    "iota",
    "async-start",
    "async-update",
}
SLICES = {"dynamic-slice", "slice", "gather"}
PASSES_ON = {"tuple", "custom-call", *SENT, *(f"{kind}-start" for kind in SENT)}  # inside a fusion


def memory_traffic(program: Program, *, unknown: int = 1) -> float:
    """Bytes of one run on one device; a loop whose length is not in the program counts `unknown` times."""
    runs, fused = program.runs(unknown), _fused(program)
    parts = (
        runs[name] * _bytes(program, computation, each)
        for name, computation in program.computations.items()
        if runs[name] and name not in fused
        for each in computation.instructions.values()
    )
    return sum(parts, 0.0)


def _fused(program: Program) -> set[str]:
    every = (each for computation in program.computations.values() for each in computation.instructions.values())
    return {name for each in every if each.opcode == "fusion" for name in each.called.values()}


def _bytes(program: Program, computation: Computation, each: Instruction) -> float:
    inside = computation.instructions
    if each.opcode in FREE or each.opcode.endswith("-done") or each.opcode.removesuffix("-start") in SENT:
        return 0.0
    if each.opcode in SLICES:
        return (_in_main_memory(inside[each.operands[0]]) + _in_main_memory(each)) * each.nbytes
    if each.opcode == "dynamic-update-slice":
        return _main_bytes(inside[each.operands[1]]) + _in_main_memory(each) * inside[each.operands[1]].nbytes
    if each.opcode == "copy-start":
        return _main_bytes(inside[each.operands[0]]) + (each.shapes[0].nbytes if each.shapes[0].in_main_memory else 0.0)
    if each.opcode == "slice-start":  # ((the array), the slice, …)
        return each.shapes[1].nbytes if _main_bytes(inside[each.operands[0]]) else 0.0
    if each.opcode == "fusion":
        return _fusion_bytes(program, [inside[name] for name in each.operands], each)
    return _main_bytes(each) + sum(_main_bytes(inside[name]) for name in set(each.operands) if name in inside)


def _main_bytes(each: Instruction) -> float:
    return sum((shape.nbytes for shape in each.shapes if shape.in_main_memory), 0.0)


def _in_main_memory(each: Instruction) -> bool:
    return all(shape.in_main_memory for shape in each.shapes)


def _fusion_bytes(program: Program, operands: list[Instruction], fusion: Instruction) -> float:
    inner = program[fusion.called["calls"]]
    reads = (
        min(_read(program, inner, parameter), _main_bytes(operand))
        for parameter, operand in zip(_parameters(inner), operands, strict=True)
        if _main_bytes(operand)
    )
    read = sum(reads, 0.0)
    shapes, results = fusion.shapes, list(_results(inner))
    if len(shapes) != len(results):
        return read + _main_bytes(fusion)
    return read + sum(_written(program, inner, each) for shape, each in zip(shapes, results) if shape.in_main_memory)


def _parameters(inner: Computation) -> list[Instruction]:
    found = (each for each in inner.instructions.values() if each.opcode == "parameter")
    return sorted(found, key=lambda each: int(each.operands[0]))


def _read(program: Program, inner: Computation, value: Instruction) -> float:
    """What a fusion, those inside of it too, reads of a parameter, or of another view of it."""
    total = 0.0
    for user in inner.users(value.name):
        first = user.operands[0] == value.name
        if user.opcode == "bitcast":
            total += _read(program, inner, user)
        elif user.opcode == "fusion":
            nested = program[user.called["calls"]]
            places = zip(_parameters(nested), user.operands, strict=True)
            total += sum(_read(program, nested, parameter) for parameter, name in places if name == value.name)
        elif user.opcode in SLICES and first:
            total += user.nbytes
        elif user.opcode not in PASSES_ON and not (user.opcode == "dynamic-update-slice" and first):
            return value.nbytes
    return min(total, value.nbytes)


def _results(inner: Computation) -> Iterator[Instruction]:
    root = inner.root
    yield from (inner.instructions[name] for name in root.operands) if root.opcode == "tuple" else (root,)


def _written(program: Program, inner: Computation, each: Instruction) -> float:
    if each.opcode == "bitcast":
        return _written(program, inner, inner.instructions[each.operands[0]])
    if each.opcode == "fusion" and len(each.shapes) == 1:
        nested = program[each.called["calls"]]
        return _written(program, nested, nested.root)
    if each.opcode == "parameter" or each.opcode in PASSES_ON:
        return 0.0
    if each.opcode == "dynamic-update-slice":
        return inner.instructions[each.operands[1]].nbytes
    return each.nbytes
