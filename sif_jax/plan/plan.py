"""Make the plan of a setting: compile every program of a step, or estimate by formulas (io)."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from sif_jax.errors import InputError
from sif_jax.models.qwen2_5_vl.axes import check_heads
from sif_jax.parallel.mesh import make_mesh
from sif_jax.plan.analytic import Estimate, estimate
from sif_jax.plan.compiled import Compiled, Compiler
from sif_jax.plan.model_size import ModelSize, model_size
from sif_jax.plan.programs import Program, attention_of, run_programs
from sif_jax.plan.roofline import StepTime, step_time
from sif_jax.plan.search import micro_batches, ranked, smallest
from sif_jax.plan.setting import Setting
from sif_jax.plan.topology import check_compiler, devices_of

FURTHER_TRIES = 5  # where none of those asked for fits


class Plan(NamedTuple):
    """Bytes per device. Without a compiler, or where the first program did not fit, `programs` is short."""

    setting: Setting
    size: ModelSize
    attention: str
    estimate: Estimate
    programs: list[Compiled]

    @property
    def needed(self) -> float:
        """By the compiled programs, else by the formulas."""
        return max((each.needed for each in self.programs), default=self.estimate.needed)

    @property
    def head_room(self) -> float:
        return self.setting.topology.chip.hbm_bytes - self.needed

    @property
    def fits(self) -> bool:
        return self.head_room >= 0

    @property
    def step(self) -> StepTime | None:
        return step_time(self.programs, self.setting.topology.chip) if self.programs else None

    @property
    def formula_error(self) -> float:
        """Of the formulas, relative to the compiled programs; NaN without them."""
        return self.estimate.needed / self.needed - 1 if self.programs else float("nan")


def make_plan(setting: Setting, *, analytic: bool = False, completion_tokens: int | None = None) -> Plan:
    """Programs are compiled in the order of a step, the first that does not fit is the last.

    Raises:
      InputError: the mesh or the batch does not divide, or the compiler for these devices is not here.
    """
    config, architecture, topology = setting.config, setting.architecture, setting.topology
    size = model_size(architecture, config)
    plan = Plan(setting, size, attention_of(config, topology.platform), estimate(setting, size), [])
    if analytic:
        return plan
    devices = devices_of(topology)
    mesh = make_mesh(config.mesh, devices)
    check_heads(architecture, mesh, Path(setting.model))
    compiler = Compiler(topology.platform, len(devices))
    programs = run_programs(config, architecture, mesh, topology.platform, compiler.executable, completion_tokens)
    return plan._replace(programs=list(_compiled(programs, compiler, topology.chip.hbm_bytes)))


def _compiled(programs: Iterator[Program], compiler: Compiler, limit: float) -> Iterator[Compiled]:
    for program in programs:
        print(f"compiling {program.name} …", end="", file=sys.stderr, flush=True)
        compiled = compiler.compile(program)
        print(f" {compiled.seconds:.0f} s", file=sys.stderr, flush=True)
        yield compiled
        if compiled.cost is None or compiled.needed > limit:
            return


def best_plan(
    setting: Setting, *, tries: int, analytic: bool = False, completion_tokens: int | None = None
) -> list[Plan]:
    """The candidates that the formulas like best, compiled; those that fit first, the fastest first. Where by the formulas
    none fits, the one that lacks least.

    Raises:
      InputError: no mesh and micro-batch go with the optimizer step.
    """
    size = model_size(setting.architecture, setting.config)
    found = ranked(setting, size) or smallest(setting, size)
    if not found:
        raise InputError(
            "no mesh and micro-batch divide this optimizer step",
            value=f"{micro_batches(setting)[-1]} rows on {setting.topology.num_devices} devices",
            fix="take fewer devices, or more rows a step",
        )
    plans: list[Plan] = []
    for each in found[: tries + FURTHER_TRIES]:
        if len(plans) >= tries and any(plan.fits for plan in plans):
            break
        plans.append(make_plan(each, analytic=analytic, completion_tokens=completion_tokens))
    return sorted(plans, key=lambda plan: (not plan.fits, plan.step.seconds if plan.step else 0.0))


def can_compile(setting: Setting) -> InputError | None:
    """Why not, if not."""
    try:
        check_compiler(setting.topology)
    except InputError as reason:
        return reason
    return None
