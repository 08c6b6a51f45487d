"""`sif-jax bench`: measured side by side, the last line JSON (io)."""

from __future__ import annotations

import click

from sif_jax.cli.command import command, json_option, main
from sif_jax.config import (
    DecodeBenchConfig,
    HacksBenchConfig,
    PrecisionBenchConfig,
    RematBenchConfig,
    RewardsBenchConfig,
    TrainBenchConfig,
)


@main.group()
def bench() -> None:
    """Measure memory, time and precision on this machine."""


@command(bench, "remat", RematBenchConfig)
@click.option(
    "--compile-only", is_flag=True, help="Memory and matrix products from the compiled programs; nothing runs."
)
@json_option
def remat(config: RematBenchConfig, compile_only: bool, json_only: bool) -> None:
    """Compare the remat policies on one LoRA SFT gradient step of a random model.

    The last line is one JSON object: machine, config, policies and their ratios to "none".

    \b
    Example: sif-jax bench remat architecture=configs/models/Qwen2.5-VL-7B-Instruct tokens=2048 --compile-only
    """
    from sif_jax.bench.remat import measure, report
    from sif_jax.bench.report_line import json_line

    figures = measure(config, compile_only=compile_only)
    click.echo(json_line(figures) if json_only else report(figures))


@command(bench, "precision", PrecisionBenchConfig)
@json_option
def precision(config: PrecisionBenchConfig, json_only: bool) -> None:
    """Compare a checkpoint's logits in model.dtype with those in float32: KL per token.

    The last line is one JSON object: machine, config, mean_kl, max_kl and the same of every input.

    \b
    Example: sif-jax bench precision model.path=ckpt/Qwen2.5-VL-7B-Instruct data.path=data/SIF-50K.json data.limit=16
    """
    from sif_jax.bench.precision import measure, report
    from sif_jax.bench.report_line import json_line

    figures = measure(config)
    click.echo(json_line(figures) if json_only else report(figures))


@command(bench, "rewards", RewardsBenchConfig)
@json_option
def rewards(config: RewardsBenchConfig, json_only: bool) -> None:
    """Compare the compiled rewards with a plain loop of SciPy and shapely, and the batched assignment with SciPy's.

    The last line is one JSON object: machine, config, times, the largest differences and the ratios.

    \b
    Example: sif-jax bench rewards completions=512 areas=8 boxes=8
    """
    from sif_jax.bench.report_line import json_line
    from sif_jax.bench.rewards import measure, report

    figures = measure(config)
    click.echo(json_line(figures) if json_only else report(figures))


@command(bench, "hacks", HacksBenchConfig)
@json_option
def hacks(config: HacksBenchConfig, json_only: bool) -> None:
    """Compare what tricks of a policy earn with its honest answers, under each setting of the rewards.

    The last line is one JSON object: machine, config, settings, and each trick's mean gain, its error and the share it pays for.

    \b
    Example: sif-jax bench hacks records=2000 seed=0
    """
    from sif_jax.bench.hacks import measure, report
    from sif_jax.bench.report_line import json_line

    figures = measure(config)
    click.echo(json_line(figures) if json_only else report(figures))


@command(bench, "decode", DecodeBenchConfig)
@click.option("--against", type=click.Choice(["none", "hf"]), default="none", help="hf: transformers' generate, too.")
@json_option
def decode(config: DecodeBenchConfig, against: str, json_only: bool) -> None:
    """Decode completions of prompts with two images each, and compare with transformers in completion tokens per second.

    Prompts are part of the time. The last line is one JSON object: machine, config, both engines, the ratio, the share of
    row-steps that were useful, and how near a step comes to the memory's bandwidth.

    \b
    Example: sif-jax bench decode --against hf --json
    """
    from sif_jax.bench.decode import measure, report
    from sif_jax.bench.report_line import json_line

    figures = measure(config, against=against)
    click.echo(json_line(figures) if json_only else report(figures))


@command(bench, "train", TrainBenchConfig)
@click.option("--against", type=click.Choice(["none", "hf"]), default="none", help="hf: transformers and PEFT, too.")
@json_option
def train_(config: TrainBenchConfig, against: str, json_only: bool) -> None:
    """Time a LoRA SFT step and a GRPO update on one device, and compare with transformers and PEFT.

    Same weights and batch; each runs in a process of its own, and they take turns. The last line is one JSON object: machine,
    config, and for each stage tokens per second, MFU, peak memory, the time of the first step, loss and gradient norm.

    \b
    Example: sif-jax bench train --against hf --json
             sif-jax bench train architecture=configs/models/Qwen2.5-VL-7B-Instruct dtype=bfloat16 --against hf
    """
    from sif_jax.bench.report_line import json_line
    from sif_jax.bench.train import measure, report

    figures = measure(config, against=against)
    click.echo(json_line(figures) if json_only else report(figures))
