"""A LoRA SFT step and a GRPO update, beside transformers and PEFT on the same weights and batch (io)."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from sif_jax.bench.report_line import Figures, text_report
from sif_jax.bench.train_flops import step_flops
from sif_jax.bench.train_workload import Stage, make_work
from sif_jax.bench.worker import Timed, Worker
from sif_jax.config import TrainBenchConfig
from sif_jax.models.qwen2_5_vl.config import Qwen2_5_VLConfig

OURS, THEIRS = "sif_jax", "transformers"
Opener = Callable[[Worker], Worker]


def measure(config: TrainBenchConfig, *, against: str) -> Figures:
    """Each stage with processes of its own."""
    from sif_jax.bench.train_ours import write_inputs

    with TemporaryDirectory(prefix="sif-jax-bench-") as directory:
        root = Path(directory)
        checkpoint, adapter = Path(config.checkpoint or root / "model"), root / "adapter"
        with Worker("the writer of weights") as writer:
            writer.run(write_inputs, config, checkpoint, adapter)
        stages = {
            stage: _stage(config, stage, (checkpoint, adapter), root / f"cache-{stage}", against=against)
            for stage in dict.fromkeys(config.stages)
        }
    machines = [found["engines"][OURS].pop("machine") for found in stages.values()]
    return {"bench": "train", "machine": machines[0], "config": config.model_dump(mode="json"), "stages": stages}


def report(figures: Figures) -> str:
    header = ["step", "engine", "seconds", "tokens per second", "times as fast", "MFU", "peak GiB", "first step, s"]
    rows = [
        [
            stage,
            name,
            f"{own['seconds']:.3f}",
            f"{own['tokens_per_second']:.0f}",
            f"{own['tokens_per_second'] / found['engines'][OURS]['tokens_per_second']:.2f}",
            f"{own['mfu']:.3f}",
            f"{own['peak_bytes'] / 2**30:.2f}",
            f"{own['first_step_seconds']:.1f}"
            + (f", warm {own['warm_first_step_seconds']:.1f}" if name == OURS else ""),
        ]
        for stage, found in figures["stages"].items()
        for name, own in found["engines"].items()
    ]
    return text_report(figures, header, rows, facts="\n\n".join(_facts(*item) for item in figures["stages"].items()))


def _facts(stage: str, found: Figures) -> str:
    ours = found["engines"][OURS]
    facts = (
        f"{stage}: {found['tokens']} tokens, {found['flops'] / 1e12:.2f} TFLOP that no engine can do without; MFU is of "
        f"{ours['peak_flops'] / 1e12:.2f} TFLOP/s ({ours['peak_source']}); attention: {ours['attention']}"
    )
    if THEIRS in found["engines"]:
        theirs = found["engines"][THEIRS]
        facts += (
            f"; ratio {found['ratio']:.2f}; first loss {ours['loss']:.6f} and {theirs['loss']:.6f}, gradient norm "
            f"{ours['grad_norm']:.6f} and {theirs['grad_norm']:.6f}"
        )
    return facts


def _stage(config: TrainBenchConfig, stage: Stage, files: tuple[Path, Path], cache: Path, *, against: str) -> Figures:
    from sif_jax.bench.train_ours import OurTraining
    from sif_jax.bench.train_transformers import TransformersTraining

    arguments, together = (config, *files, stage), config.in_turns and against == "hf"
    openers: dict[str, Opener] = {
        OURS: lambda worker: worker.open(OurTraining, *arguments, cache=cache, alone=not together)
    }
    if against == "hf":
        openers[THEIRS] = lambda worker: worker.open(TransformersTraining, *arguments)
    groups = [openers] if together else [{name: opener} for name, opener in openers.items()]
    engines = {name: own for group in groups for name, own in _timed(group, config.steps).items()}
    architecture = Qwen2_5_VLConfig.from_directory(files[0])
    work = make_work(config, architecture, stage)
    flops = step_flops(architecture, work, rank=config.lora_rank)
    for own in engines.values():
        own["tokens_per_second"] = work.tokens / own["seconds"]
        own["mfu"] = flops / own["seconds"] / engines[OURS]["peak_flops"]
    found: Figures = {"tokens": work.tokens, "flops": flops, "engines": engines}
    if against == "hf":
        found["ratio"] = engines[THEIRS]["seconds"] / engines[OURS]["seconds"]
    return found


def _timed(openers: dict[str, Opener], steps: int) -> dict[str, Figures]:
    """Figures of each engine; those given together take turns."""
    with ExitStack() as stack:
        workers = {name: opener(stack.enter_context(Worker(name))) for name, opener in openers.items()}
        firsts = {name: _announced(f"{name}, first step", worker.step()) for name, worker in workers.items()}
        warm = {OURS: workers[OURS].forget_programs().step().seconds} if OURS in workers else {}
        turns = [
            {name: _announced(f"{name}, step {turn + 1}", worker.step()).seconds for name, worker in workers.items()}
            for turn in range(steps)
        ]
        return {
            name: _figures(firsts[name], [turn[name] for turn in turns], worker.figures(), warm.get(name))
            for name, worker in workers.items()
        }


def _announced(what: str, timed: Timed) -> Timed:
    """Said at once: what a bench that is stopped has measured is not lost."""
    print(f"{what}: {timed.seconds:.3f} s", file=sys.stderr)
    return timed


def _figures(first: Timed, seconds: list[float], told: dict[str, Any], warm: float | None) -> Figures:
    """`warm` is the time of a first step whose programs are in the compilation cache."""
    return {
        "seconds": statistics.median(seconds),
        "all_seconds": seconds,
        "first_step_seconds": first.seconds,
        "loss": first.step.loss,
        "grad_norm": first.step.grad_norm,
        **({} if warm is None else {"warm_first_step_seconds": warm}),
        **told,
    }
