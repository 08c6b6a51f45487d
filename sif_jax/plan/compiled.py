"""Compile a program for devices that need not be here, and read off what it needs (io)."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax

from sif_jax.bench.flops import matmul_flops
from sif_jax.plan import hlo
from sif_jax.plan.collectives import Traffic, collectives
from sif_jax.plan.memory_traffic import memory_traffic
from sif_jax.plan.programs import Program

UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
# As TPU compilers say it: of the whole program, or, where that alone is too much, of its temporaries.
USED = re.compile(
    r"(?:Used |required for HLO temporaries \()([\d.]+)([KMGT])(?: of [\d.]+[KMGT] hbm|\) exceeds available HBM)"
)
LOWERING = {"tpu": "tpu", "gpu": "cuda"}


class Memory(NamedTuple):
    """Bytes per device."""

    arguments: float
    temporaries: float
    peak: float  # arguments, results and temporaries at once
    code: float


class Cost(NamedTuple):
    """Of one run, per device."""

    flops: float
    memory_bytes: float
    collectives: Mapping[str, Traffic]


class Compiled(NamedTuple):
    program: Program
    memory: Memory
    cost: Cost | None  # None: it did not fit, so there is no program to read
    seconds: float

    @property
    def needed(self) -> float:
        """With what the run holds beside it."""
        return self.memory.peak + self.memory.code + self.program.beside


class Compiler:
    """Each program is compiled once."""

    def __init__(self, platform: str, devices: int) -> None:
        self._platform, self._devices = platform, devices
        self._executables: dict[str, Any] = {}

    def executable(self, program: Program) -> Any:
        """
        Raises:
          jax.errors.JaxRuntimeError: RESOURCE_EXHAUSTED, as TPU compilers say that a program does not fit.
        """
        traced = program.function.trace(*program.arguments, **program.settings)
        if not program.name:  # a helper, whose results' places are asked for
            return self._compile(traced)
        if program.name not in self._executables:
            self._executables[program.name] = self._compile(traced)
        return self._executables[program.name]

    def _compile(self, traced: Any) -> Any:
        return traced.lower(lowering_platforms=(LOWERING.get(self._platform, self._platform),)).compile()

    def compile(self, program: Program) -> Compiled:
        began = time.perf_counter()
        traced = program.function.trace(*program.arguments, **program.settings)
        try:
            executable = self.executable(program)
        except jax.errors.JaxRuntimeError as error:
            return Compiled(program, _too_large(error), None, time.perf_counter() - began)
        text = hlo.Program(executable.as_text())
        cost = Cost(
            matmul_flops(traced.jaxpr.jaxpr, program.turns) / self._devices,
            memory_traffic(text, unknown=program.turns),
            collectives(text, devices=self._devices, unknown=program.turns),
        )
        return Compiled(program, _memory(executable.memory_analysis()), cost, time.perf_counter() - began)


def _memory(stats: Any) -> Memory:
    return Memory(
        float(stats.argument_size_in_bytes),
        float(stats.temp_size_in_bytes),
        float(stats.peak_memory_in_bytes),
        float(stats.generated_code_size_in_bytes),
    )


def _too_large(error: RuntimeError) -> Memory:
    """What the compiler says that the program would use.

    Raises:
      jax.errors.JaxRuntimeError: it failed for another reason.
    """
    found = USED.search(str(error))
    if "RESOURCE_EXHAUSTED" not in str(error) or found is None:
        raise error
    used = float(found.group(1)) * UNITS[found.group(2)]
    return Memory(float("nan"), float("nan"), used, 0.0)
