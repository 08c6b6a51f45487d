"""A plan as a table, its advice, and one line of JSON (pure, but for the machine's name)."""

from __future__ import annotations

from collections.abc import Iterator
from math import isnan
from typing import Any

from sif_jax.bench.report_line import Figures, machine, text_report
from sif_jax.config import GrpoConfig, SftConfig
from sif_jax.parallel.chips import GIB
from sif_jax.plan.collectives import total_bytes
from sif_jax.plan.compiled import Compiled
from sif_jax.plan.plan import Plan
from sif_jax.plan.roofline import times
from sif_jax.plan.search import first_of_each_kind, overrides, remedies

HEADER = [
    "program",
    "runs",
    "arguments, GiB",
    "temporaries, GiB",
    "peak, GiB",
    "held beside, GiB",
    "head-room, GiB",
    "TFLOP",
    "memory, GiB",
    "sent, GiB",
    "at least, ms",
    "bound by",
]


def figures(plan: Plan) -> Figures:
    """Everything that the report says; bytes, FLOPs and seconds per device."""
    setting, step = plan.setting, plan.step
    return {
        "plan": setting.kind,
        "machine": machine(),
        "model": setting.model,
        "topology": setting.topology.name,
        "chip": setting.topology.chip.name,
        "devices": setting.topology.num_devices,
        "mesh": setting.mesh,
        "overrides": overrides(setting),
        "config": setting.config.model_dump(mode="json"),
        "attention": plan.attention,
        "parameters": plan.size.parameters,
        "trained": plan.size.trainable,
        "limit_bytes": setting.topology.chip.hbm_bytes,
        "needed_bytes": plan.needed,
        "head_room_bytes": plan.head_room,
        "fits": plan.fits,
        "by": "compiled programs" if plan.programs else "formulas",
        "formulas": {
            "needed_bytes": plan.estimate.needed,
            "error": None if isnan(plan.formula_error) else plan.formula_error,
            "held": plan.estimate.held,
            "phases": {phase.name: phase.parts for phase in plan.estimate.phases},
        },
        "programs": [_program_figures(each, plan) for each in plan.programs],
        "step": None if step is None else {"seconds": step.seconds, "bound_by": step.bound_by, "shares": step.shares},
        "remedies": advice(plan),
    }


def _program_figures(each: Compiled, plan: Plan) -> Figures:
    chip, program = plan.setting.topology.chip, each.program
    common = {
        "name": program.name,
        "runs": program.calls,
        "argument_bytes": None if isnan(each.memory.arguments) else each.memory.arguments,
        "temporary_bytes": None if isnan(each.memory.temporaries) else each.memory.temporaries,
        "peak_bytes": each.memory.peak,
        "code_bytes": each.memory.code,
        "beside_bytes": program.beside,
        "head_room_bytes": chip.hbm_bytes - each.needed,
        "compile_seconds": round(each.seconds, 1),
    }
    if each.cost is None:
        return common
    bound = times(each.cost, chip)
    return common | {
        "flops": each.cost.flops,
        "memory_bytes": each.cost.memory_bytes,
        "collectives": {kind: {"count": x.count, "bytes": x.nbytes} for kind, x in each.cost.collectives.items()},
        "seconds": bound._asdict(),
        "bound_by": bound.bound_by,
    }


def advice(plan: Plan) -> list[str]:
    """What would fit, where this does not."""
    if plan.fits:
        return []
    scale = plan.needed / plan.estimate.needed
    return first_of_each_kind(remedies(plan.setting, plan.size, scale))


def report(plan: Plan) -> str:
    """The table of programs, or of the formulas' parts where nothing was compiled, and what it means."""
    rows = [_row(each, plan) for each in plan.programs]
    header = HEADER if rows else ["part", "GiB per device"]
    facts = "\n".join([*_collective_lines(plan), *_summary(plan)])
    title = "\n".join(_title(plan))
    return f"{title}\n\n{text_report(figures(plan), header, rows or list(_parts(plan)), facts=facts)}"


def _title(plan: Plan) -> Iterator[str]:
    setting, size = plan.setting, plan.size
    chip = setting.topology.chip
    yield f"{setting.kind} of {setting.model}: {size.parameters:,} parameters, {size.trainable:,} trained"
    yield (
        f"on {setting.topology.name}: {setting.topology.num_devices} x {chip.name}, {chip.hbm_bytes / GIB:.2f} GiB each; "
        f"{overrides(setting)}; {plan.attention} attention"
    )
    yield f"{_batch(plan)}. Figures are per device and per run of a program."


def _batch(plan: Plan) -> str:
    config = plan.setting.config
    tokens, patches = config.data.buckets.pairs[-1]
    if isinstance(config, SftConfig):
        return f"{config.batch_size} rows x {config.accumulation} of {tokens} tokens and {patches} patches"
    assert isinstance(config, GrpoConfig)
    return (
        f"{config.prompts_per_step} prompts of {tokens} tokens and {patches} patches, {config.num_samples} completions each "
        f"of {config.max_new_tokens} tokens"
    )


def _row(each: Compiled, plan: Plan) -> list[str]:
    memory, program = each.memory, each.program
    room = plan.setting.topology.chip.hbm_bytes - each.needed
    cells = [
        program.name,
        f"{program.calls:g}",
        *(_gib(x) for x in (memory.arguments, memory.temporaries, memory.peak, program.beside, room)),
    ]
    if each.cost is None:
        return [*cells, "-", "-", "-", "-", "does not fit"]
    cost, bound = each.cost, times(each.cost, plan.setting.topology.chip)
    sent = total_bytes(cost.collectives)
    return [
        *cells,
        f"{cost.flops / 1e12:.3g}",
        _gib(cost.memory_bytes),
        _gib(sent),
        f"{1000 * bound.bound:.3g}",
        bound.bound_by,
    ]


def _parts(plan: Plan) -> Iterator[list[str]]:
    for name, amount in plan.estimate.held.items():
        yield [name, _gib(amount)]
    for phase in plan.estimate.phases:
        yield [f"{phase.name}, in all", _gib(phase.total)]
        yield from ([f"- {name}", _gib(amount)] for name, amount in phase.parts.items() if amount)


def _collective_lines(plan: Plan) -> Iterator[str]:
    for each in plan.programs:
        if each.cost and each.cost.collectives:
            kinds = (f"{x.count:g} {kind}s ({_gib(x.nbytes)} GiB)" for kind, x in each.cost.collectives.items())
            yield f"{each.program.name} sends {', '.join(kinds)}."


def _summary(plan: Plan) -> Iterator[str]:
    limit = plan.setting.topology.chip.hbm_bytes
    by = "" if plan.programs else " by the formulas"
    if plan.fits:
        yield f"Fits{by}: {_gib(plan.needed)} of {_gib(limit)} GiB, head-room {_gib(plan.head_room)} GiB."
    else:
        yield f"Does not fit{by}: {_gib(plan.needed)} of {_gib(limit)} GiB, {_gib(-plan.head_room)} GiB too much. What would:"
        yield from (f"- {line}" for line in advice(plan) or ["nothing that was tried; take a smaller model"])
    if plan.programs:
        yield f"The formulas alone say {_gib(plan.estimate.needed)} GiB ({plan.formula_error:+.0%})."
    if plan.step:
        shares = ", ".join(f"{name} {share:.3g} s" for name, share in plan.step.shares.items() if share)
        yield f"An optimizer step takes at least {plan.step.seconds:.3g} s, by what bounds its programs: {shares}."
        yield "That is a roofline: every unit at its data sheet's rate, nothing in the way. Real steps take longer."


def _gib(nbytes: float) -> str:
    return "-" if isnan(nbytes) else f"{nbytes / GIB:.2f}"


def brief(plan: Plan) -> list[str]:
    """One line of a search."""
    step = plan.step
    return [
        overrides(plan.setting),
        _gib(plan.needed),
        _gib(plan.head_room),
        "-" if step is None else f"{step.seconds:.3g}",
        "-" if step is None else step.bound_by,
    ]


def search_report(plans: list[Plan]) -> str:
    """All that were tried, and the best in full."""
    header: list[Any] = ["config", "needed, GiB", "head-room, GiB", "step at least, s", "bound by"]
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *(brief(plan) for plan in plans)]
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    return f"Tried, the best first:\n\n{table}\n\n{report(plans[0])}"
