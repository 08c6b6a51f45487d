"""Read the text of a compiled program: its computations, who calls which, and how often a loop turns (pure)."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from math import prod
from typing import NamedTuple

ITEM_BYTES = {"pred": 1.0, "s4": 0.5, "u4": 0.5, "token": 0.0, "opaque": 0.0}
HEAD = re.compile(r"^(ENTRY )?%?([^\s(]+) (?:\(.*)?\{$")
LINE = re.compile(r"^\s+(ROOT )?%?([^\s=]+) = (.*)$")
ARRAY = re.compile(r"\b([a-z]+\d*[a-z0-9]*)\[([\d,<=]*)\](?:\{([^}]*)\})?")
CALLED = re.compile(r"\b(calls|body|condition|to_apply|true_computation|false_computation)=%?([^,\s}]+)")
BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
TRANSPARENT = {"copy", "bitcast", "convert", "copy-done", "copy-start", "reshape", "optimization-barrier"}


class Shape(NamedTuple):
    """One array of a value's type."""

    dtype: str
    dims: tuple[int, ...]
    in_main_memory: bool  # and not in a TPU's vector memory, S(1), or on the host

    @property
    def nbytes(self) -> float:
        return prod(self.dims) * item_bytes(self.dtype)


class Instruction(NamedTuple):
    name: str
    type: str
    opcode: str
    operands: tuple[str, ...]
    attributes: str
    is_root: bool

    @property
    def shapes(self) -> list[Shape]:
        return list(shapes_of(self.type))

    @property
    def nbytes(self) -> float:
        return sum((shape.nbytes for shape in self.shapes), 0.0)

    def attribute(self, pattern: str) -> str | None:
        found = re.search(pattern, self.attributes)
        return found and found.group(1)

    @property
    def called(self) -> dict[str, str]:
        """Computations by role."""
        called = {key: name for key, name in CALLED.findall(self.attributes)}
        if branches := BRANCHES.search(self.attributes):
            names = [name.strip().lstrip("%") for name in branches.group(1).split(",")]
            called |= {f"branch {number}": name for number, name in enumerate(names)}
        return called


class Computation(NamedTuple):
    name: str
    instructions: Mapping[str, Instruction]

    @property
    def root(self) -> Instruction:
        return next(each for each in self.instructions.values() if each.is_root)

    def users(self, name: str) -> list[Instruction]:
        return [each for each in self.instructions.values() if name in each.operands]


class Program:
    def __init__(self, text: str) -> None:
        self.computations, self.entry = _parse(text)

    def __getitem__(self, name: str) -> Computation:
        return self.computations[name]

    @cached_property
    def turns(self) -> Mapping[str, int | None]:
        """By the name of each while instruction; None: the program decides as it runs."""
        loops = [
            (computation, each)
            for computation in self.computations.values()
            for each in computation.instructions.values()
            if each.opcode == "while"
        ]
        return {loop.name: _turns(self, computation, loop) for computation, loop in loops}

    def runs(self, unknown: int = 1) -> dict[str, float]:
        """How often each computation runs, the costliest of a conditional's branches counted as all of them are.

        A loop whose length is not in the program counts `unknown` times. Of a computation that is called from several places,
        the sum.
        """
        counts = dict.fromkeys(self.computations, 0.0)
        for name, times in self._calls(self.entry, 1.0, unknown):
            counts[name] += times
        return counts

    def _calls(self, name: str, times: float, unknown: int) -> Iterator[tuple[str, float]]:
        yield name, times
        for each in self.computations[name].instructions.values():
            inside = times
            if each.opcode == "while":
                turns = self.turns[each.name]
                inside = times * (unknown if turns is None else turns)
            for role, called in each.called.items():
                if role != "to_apply" or each.opcode in ("call", "async-start"):
                    yield from self._calls(called, inside, unknown)


def item_bytes(dtype: str) -> float:
    if dtype in ITEM_BYTES:
        return ITEM_BYTES[dtype]
    bits = re.match(r"(?:bf|f|s|u|c)(\d+)", dtype)
    return int(bits.group(1)) / 8 if bits else 0.0


def shapes_of(text: str) -> Iterator[Shape]:
    for dtype, dims, layout in ARRAY.findall(text):
        sizes = tuple(int(size.strip("<=")) for size in dims.split(",") if size)
        yield Shape(dtype, sizes, "S(" not in layout)


def _parse(text: str) -> tuple[dict[str, Computation], str]:
    computations: dict[str, Computation] = {}
    entry, current = "", None
    for line in text.splitlines():
        if current is None or not line.startswith(" "):
            head = HEAD.match(line)
            if head:
                current = {}
                computations[head.group(2)] = Computation(head.group(2), current)
                entry = head.group(2) if head.group(1) else entry
        elif found := LINE.match(line):
            instruction = _instruction(found.group(2), found.group(3), bool(found.group(1)))
            current[instruction.name] = instruction
    return computations, entry


def _instruction(name: str, text: str, is_root: bool) -> Instruction:
    end = _closing(text, 0) if text.startswith("(") else text.index(" ")
    type_, rest = text[:end], text[end:].lstrip()
    opcode, _, _ = rest.partition("(")
    stop = _closing(rest, len(opcode))
    operands = tuple(re.findall(r"%([^\s,()]+)", rest[len(opcode) : stop]))
    if not operands and opcode in ("constant", "parameter"):
        operands = (rest[len(opcode) + 1 : stop - 1],)
    return Instruction(name, type_, opcode.strip(), operands, rest[stop:], is_root)


def _closing(text: str, start: int) -> int:
    """Past the parenthesis that closes the one at `start`."""
    depth = 0
    for index in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[index], 0)
        if depth == 0:
            return index + 1
    raise ValueError(f"no closing parenthesis: {text[start : start + 80]}")


class _Value(NamedTuple):
    """An instruction, and what the parameters of its computation stand for: values, or the variables of a loop."""

    computation: Computation
    instruction: Instruction
    arguments: Sequence[_Value] | None  # None: the loop's variables, or the program's own arguments


def _turns(program: Program, around: Computation, loop: Instruction) -> int | None:
    """Derived from the condition `variable < bound`, the variable's start and its step; several conditions: the least."""
    if known := loop.attribute(r'"known_trip_count":\{"n":"(\d+)"'):
        return int(known)
    condition, body = (program[loop.called[role]] for role in ("condition", "body"))
    counts = []
    for compare in _conjuncts(program, _Value(condition, condition.root, None)):
        count = _count(program, compare, around, loop, body)
        counts += [] if count is None else [count]
    return min(counts, default=None)


def _conjuncts(program: Program, value: _Value) -> Iterator[_Value]:
    value = _settled(program, value)
    if value.instruction.opcode == "and":
        for operand in value.instruction.operands:
            yield from _conjuncts(program, value._replace(instruction=value.computation.instructions[operand]))
    elif value.instruction.opcode == "compare":
        yield value


def _count(program: Program, compare: _Value, around: Computation, loop: Instruction, body: Computation) -> int | None:
    direction = compare.instruction.attribute(r"direction=(\w+)")
    left, right = (
        _settled(program, compare._replace(instruction=compare.computation.instructions[name]))
        for name in compare.instruction.operands
    )
    if direction in ("GT", "GE"):
        left, right, direction = right, left, {"GT": "LT", "GE": "LE"}[direction]
    variable = _variable(left)
    bound = _number(program, right, around, loop)
    if variable is None or bound is None or direction not in ("LT", "LE", "NE"):
        return None
    start, step = _initial(program, around, loop, variable) or 0, _step(program, body, variable)
    return max(-(-(bound + (direction == "LE") - start) // step), 0)


def _settled(program: Program, value: _Value) -> _Value:
    """Through copies, fusions and calls to the instruction that makes the value."""
    while True:
        instruction, inside = value.instruction, value.computation.instructions
        if instruction.opcode in TRANSPARENT:
            value = value._replace(instruction=inside[instruction.operands[0]])
        elif instruction.opcode in ("fusion", "call"):
            called = program[next(iter(instruction.called.values()))]
            arguments = [value._replace(instruction=inside[name]) for name in instruction.operands]
            value = _Value(called, called.root, arguments)
        elif instruction.opcode == "parameter" and value.arguments is not None:
            value = value.arguments[int(instruction.operands[0])]
        else:
            return value


def _variable(value: _Value) -> int | None:
    """Which of the loop's variables this is."""
    if value.instruction.opcode != "get-tuple-element":
        return None
    source = value.computation.instructions[value.instruction.operands[0]]
    index = value.instruction.attribute(r"index=(\d+)")
    return int(index) if source.opcode == "parameter" and index is not None else None


def _number(program: Program, value: _Value, around: Computation, loop: Instruction) -> int | None:
    """A constant, or a variable that starts as one; that a bound does not change is taken for granted."""
    if value.instruction.opcode == "constant":
        return _constant(value.instruction)
    variable = _variable(value)
    return None if variable is None else _initial(program, around, loop, variable)


def _initial(program: Program, around: Computation, loop: Instruction, variable: int) -> int | None:
    start = _settled(program, _Value(around, around.instructions[loop.operands[0]], None))
    if start.instruction.opcode != "tuple":
        return None
    name = start.instruction.operands[variable]
    value = _settled(program, start._replace(instruction=start.computation.instructions[name]))
    return _constant(value.instruction) if value.instruction.opcode == "constant" else None


def _constant(instruction: Instruction) -> int | None:
    text = instruction.operands[0]
    return int(text) if re.fullmatch(r"-?\d+", text) else None


def _step(program: Program, body: Computation, variable: int) -> int:
    """What is added to the variable in a turn; 1 where that is not plain."""
    root = _settled(program, _Value(body, body.root, None))
    if root.instruction.opcode != "tuple":
        return 1
    name = root.instruction.operands[variable]
    value = _settled(program, root._replace(instruction=root.computation.instructions[name]))
    if value.instruction.opcode != "add":
        return 1
    for operand in value.instruction.operands:
        part = _settled(program, value._replace(instruction=value.computation.instructions[operand]))
        number = _constant(part.instruction) if part.instruction.opcode == "constant" else None
        if number is not None and number > 0:
            return number
    return 1
