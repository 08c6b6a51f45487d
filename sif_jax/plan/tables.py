"""docs/results/plan.md from saved lines of `sif-jax plan --json` (io).

python -m sif_jax.plan.tables docs/results/plan.jsonl > docs/results/plan.md
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from sif_jax.parallel.chips import GIB
from sif_jax.plan.setting import MODELS

Figures = dict[str, Any]
HEADER = (
    "model",
    "topology",
    "config",
    "needed, GiB",
    "head-room, GiB",
    "formulas",
    "largest program",
    "step at least, s",
    "bound by",
    "compiled in, s",
)
PROGRAM_HEADER = (
    "program",
    "runs",
    "arguments, GiB",
    "temporaries, GiB",
    "peak, GiB",
    "beside, GiB",
    "TFLOP",
    "memory, GiB",
    "sent, GiB",
    "at least, ms",
    "bound by",
    "collectives",
)
INTRODUCTION = """# Plans of the paper's configs

Programs compiled by `sif-jax plan` for devices that were not there; [docs/plan.md](../plan.md) says what the columns mean and
how far to trust them. Figures are per device. Meshes, micro-batches and remat policies are those that `--search --tries 1` chose:
the fastest by the formulas that fits, or where none does the one that lacks least. "formulas" is the error of the formulas
against the compiled programs. Times are rooflines, lower than any real step. Settings that are not in the table have not been
compiled; the command says what they need.

    sif-jax plan configs/paper/sft.yaml  --topology v5e-16 --model 7B --search --tries 1 --json >> docs/results/plan.jsonl
    sif-jax plan configs/paper/grpo.yaml --topology v5e-16 --model 7B --search --tries 1 --json >> docs/results/plan.jsonl
    python -m sif_jax.plan.tables docs/results/plan.jsonl > docs/results/plan.md
"""


def tables(lines: Sequence[Figures]) -> str:
    ordered = sorted(lines, key=_order)
    parts = [INTRODUCTION]
    for kind, title in (("sft", "SFT"), ("grpo", "GRPO")):
        own = [each for each in ordered if each["plan"] == kind]
        if own:
            parts.append(f"## {title}\n\n{_table(HEADER, map(_summary, own))}\n")
    parts.append("## Program by program\n")
    parts += [_programs(each) for each in ordered]
    parts.append(f"## Machines\n\n{_machines(ordered)}\n")
    return "\n".join(parts)


def _order(each: Figures) -> tuple[str, int, int, str]:
    model = MODELS.index(each["model"]) if each["model"] in MODELS else len(MODELS)
    return each["plan"], each["devices"], model, each["topology"]


def _summary(each: Figures) -> list[str]:
    programs, step, error = each["programs"], each["step"], each["formulas"]["error"]
    largest = min(programs, key=lambda program: program["head_room_bytes"])["name"] if programs else "-"
    return [
        each["model"],
        each["topology"],
        f"`{each['overrides']}`",
        _gib(each["needed_bytes"]),
        _gib(each["head_room_bytes"]) if each["fits"] else f"**{_gib(each['head_room_bytes'])}**",
        "-" if error is None else f"{error:+.0%}",
        largest,
        "-" if step is None else f"{step['seconds']:.3g}",
        "-" if step is None else step["bound_by"],
        f"{sum(program['compile_seconds'] for program in programs):.0f}",
    ]


def _programs(each: Figures) -> str:
    title = f"### {each['plan'].upper()} of {each['model']} on {each['topology']}, {each['attention']} attention\n"
    return f"{title}\n{_table(PROGRAM_HEADER, map(_program, each['programs']))}\n"


def _program(program: Figures) -> list[str]:
    cells = [program["name"], f"{program['runs']:g}"]
    cells += [_gib(program[f"{name}_bytes"]) for name in ("argument", "temporary", "peak", "beside")]
    if "flops" not in program:
        return [*cells, *"-----", "does not fit"]
    kinds = program["collectives"]
    return [
        *cells,
        f"{program['flops'] / 1e12:.3g}",
        _gib(program["memory_bytes"]),
        _gib(sum(kind["bytes"] for kind in kinds.values())),
        f"{1000 * max(program['seconds'].values()):.3g}",
        program["bound_by"],
        ", ".join(f"{kind} {x['count']:g} ({_gib(x['bytes'])} GiB)" for kind, x in kinds.items()),
    ]


def _machines(lines: Sequence[Figures]) -> str:
    found = {", ".join(f"{key} {value}" for key, value in each["machine"].items() if key != "device") for each in lines}
    return "\n".join(f"- {machine}" for machine in sorted(found))


def _table(header: Sequence[str], rows: Iterator[list[str]] | map[list[str]]) -> str:
    lines = [list(header), ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _gib(nbytes: float | None) -> str:
    """A program that its compiler refused has no account of arguments and temporaries."""
    return "-" if nbytes is None else f"{nbytes / GIB:.2f}"


def main(paths: Sequence[str]) -> None:
    lines = [json.loads(line) for path in paths for line in Path(path).read_text().splitlines() if line.strip()]
    print(tables(lines), end="")


if __name__ == "__main__":
    main(sys.argv[1:])
