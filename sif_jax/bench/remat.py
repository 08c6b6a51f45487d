"""What each remat policy costs: memory, matrix products and time of one LoRA SFT gradient step (io)."""

from __future__ import annotations

import statistics
import time
from typing import Any, NamedTuple, get_args

import jax
import numpy as np
from flax import nnx

from sif_jax.bench.flops import matmul_flops
from sif_jax.bench.report_line import Figures, machine, text_report
from sif_jax.bench.workload import abstract_policy, random_batch, random_policy
from sif_jax.config import RematBenchConfig
from sif_jax.models.qwen2_5_vl.config import Qwen2_5_VLConfig
from sif_jax.ops.scan import Remat
from sif_jax.training.sft import make_gradients

POLICIES: tuple[Remat, ...] = get_args(Remat)
GIB = 2**30


class Program(NamedTuple):
    step: Any
    flops: int
    compile_seconds: float


def measure(config: RematBenchConfig, *, compile_only: bool) -> Figures:
    """Figures of every policy; the ratios are to "none". Compiling alone needs no memory for the model."""
    architecture = Qwen2_5_VLConfig.from_directory(config.architecture)
    batch = random_batch(architecture, rows=config.rows, tokens=config.tokens, image_px=config.image_px)
    programs: dict[Remat, Program] = {policy: _compiled(architecture, batch, config, policy) for policy in POLICIES}
    milliseconds = {} if compile_only else _times(programs, architecture, batch, config)
    figures = {policy: _figures(programs[policy], milliseconds.get(policy)) for policy in POLICIES}
    return {
        "bench": "remat",
        "machine": machine(),
        "config": config.model_dump(mode="json"),
        "policies": figures,
        "ratios": {policy: _ratios(figures[policy], figures["none"]) for policy in POLICIES},
    }


def report(figures: Figures) -> str:
    header = [
        "remat",
        "temporaries, GiB",
        "of none",
        "with arguments, GiB",
        "matmul TFLOP",
        "of none",
        "ms/step",
        "of none",
    ]
    rows = [
        [
            policy,
            f"{own['temporary_bytes'] / GIB:.2f}",
            f"{ratios['temporary_bytes']:.2f}",
            f"{own['total_bytes'] / GIB:.2f}",
            f"{own['matmul_flops'] / 1e12:.3f}",
            f"{ratios['matmul_flops']:.2f}",
            *(["-", "-"] if own["ms"] is None else [f"{own['ms']:.0f}", f"{ratios['ms']:.2f}"]),
        ]
        for (policy, own), ratios in zip(figures["policies"].items(), figures["ratios"].values(), strict=True)
    ]
    return text_report(figures, header, rows)


def _compiled(
    architecture: Qwen2_5_VLConfig, batch: dict[str, np.ndarray], config: RematBenchConfig, remat: Remat
) -> Program:
    graphdef, trainable, frozen = abstract_policy(
        architecture,
        dtype=config.dtype,
        remat=remat,
        lora_rank=config.lora_rank,
        freeze_vision=config.freeze_vision,
    )
    began = time.perf_counter()
    traced = make_gradients(graphdef, dropout=False).trace(None, trainable, frozen, batch, jax.random.key(0))
    step = traced.lower().compile()
    return Program(step, matmul_flops(traced.jaxpr.jaxpr), time.perf_counter() - began)


def _times(
    programs: dict[Remat, Program],
    architecture: Qwen2_5_VLConfig,
    batch: dict[str, np.ndarray],
    config: RematBenchConfig,
) -> dict[Remat, float]:
    """Median milliseconds of a step; the policies take turns, so that a busy moment of the machine meets them all."""
    _, trainable, frozen = random_policy(
        architecture, dtype=config.dtype, lora_rank=config.lora_rank, freeze_vision=config.freeze_vision
    )
    arguments = jax.device_put((trainable, frozen, batch, jax.random.key(0)))
    turns: list[dict[Remat, float]] = [
        {policy: _milliseconds(program, *arguments) for policy, program in programs.items()}
        for _ in range(config.steps + 1)
    ]
    return {policy: statistics.median(turn[policy] for turn in turns[1:]) for policy in programs}


def _milliseconds(program: Program, trainable: nnx.State, frozen: nnx.State, batch: Any, key: jax.Array) -> float:
    began = time.perf_counter()
    jax.block_until_ready(program.step(None, trainable, frozen, batch, key))
    return 1000 * (time.perf_counter() - began)


def _figures(program: Program, milliseconds: float | None) -> Figures:
    memory = program.step.memory_analysis()
    held = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    return {
        "temporary_bytes": memory.temp_size_in_bytes,
        "total_bytes": held + memory.temp_size_in_bytes,
        "matmul_flops": program.flops,
        "compile_seconds": round(program.compile_seconds, 1),
        "ms": None if milliseconds is None else round(milliseconds, 1),
    }


def _ratios(own: Figures, none: Figures) -> Figures:
    names = [name for name in ("temporary_bytes", "total_bytes", "matmul_flops", "ms") if own[name] is not None]
    return {name: round(own[name] / none[name], 3) for name in names}
