"""The commands that train and use a model (io)."""

from __future__ import annotations

from pathlib import Path

import click

from sif_jax.cli.command import command, main
from sif_jax.config import (
    AblationConfig,
    DataConfig,
    DemoConfig,
    EvalConfig,
    ExportConfig,
    GenerateConfig,
    GrpoConfig,
    RunName,
    SftConfig,
)
from sif_jax.errors import InputError

dry_run = click.option("--dry-run", is_flag=True, help="Check the config, the data and the model's path, and exit.")


@command(main, "demo", DemoConfig)
def demo(config: DemoConfig) -> None:
    """Run the whole path on a tiny random model: scenes, SFT, GRPO-SIF, evaluation.

    Run it in the root of the checkout. It takes a few minutes on a CPU.

    \b
    Example: sif-jax demo configs/demo/demo.yaml
    """
    from sif_jax.demo import run

    click.echo(run(config))


@command(main, "sft", SftConfig)
@dry_run
def sft(config: SftConfig, dry_run: bool) -> None:
    """Fine-tune on the chains of thought (or the bare answers) of a records file.

    The same command resumes a run that was stopped.

    \b
    Example: sif-jax sft configs/paper/sft.yaml data.path=data/SIF-50K.json model.path=ckpt/Qwen2.5-VL-7B-Instruct
    """
    if dry_run:
        rows = report_inputs(config.run, config.model.path, config.data)
        report_steps(rows, config.epochs, config.batch_size * config.accumulation, config.max_steps)
        return
    from sif_jax.parallel.job import Job
    from sif_jax.training.sft import train

    with Job():
        click.echo(train(config))


@command(main, "grpo", GrpoConfig)
@dry_run
def grpo(config: GrpoConfig, dry_run: bool) -> None:
    """Reinforce with GRPO-SIF: rewards for format, answer, boxes and depth.

    The same command resumes a run that was stopped.

    \b
    Example: sif-jax grpo configs/paper/grpo.yaml model.path=runs/paper-sft num_samples=16
    """
    if dry_run:
        rows = report_inputs(config.run, config.model.path, config.data)
        report_steps(rows, config.epochs, config.prompts_per_step, config.max_steps)
        return
    from sif_jax.parallel.job import Job
    from sif_jax.training.grpo import train

    with Job():
        click.echo(train(config))


@command(main, "eval", EvalConfig)
@dry_run
def eval_(config: EvalConfig, dry_run: bool) -> None:
    """Score a model on a records file: greedy and strict.

    \b
    Example: sif-jax eval configs/paper/eval.yaml model.path=runs/paper-grpo data.path=data/test.json
    """
    if dry_run:
        report_inputs(config.run, config.model.path, config.data)
        return
    from sif_jax.evals.evaluate import evaluate
    from sif_jax.parallel.job import Job

    with Job():
        click.echo(evaluate(config))


@command(main, "ablate", AblationConfig)
@click.option(
    "--dry-run", is_flag=True, help="Check every config, list the runs and which of them are finished, and exit."
)
def ablate(config: AblationConfig, dry_run: bool) -> None:
    """Train and evaluate a grid of variants, and compare them in one table.

    The same command goes on where it stopped; a finished run is not repeated.

    \b
    Example: sif-jax ablate configs/ablation/paper.yaml --dry-run
    """
    from sif_jax.ablation import describe_plan, run

    if dry_run:
        click.echo(describe_plan(config))
        return
    table = run(config)
    click.echo(f"{table.read_text()}\n{table}")


@command(main, "generate", GenerateConfig, as_keys=("depth", "overlay"))
@click.option("--depth", metavar="FILE|none", help="The same as depth=FILE; none: the prompt shows the image alone.")
@click.option("--overlay", metavar="FILE|none", help="The same as overlay=FILE; none: no picture is written.")
def generate(config: GenerateConfig) -> None:
    """Answer one question about one image, and draw the trace on it.

    \b
    Example: sif-jax generate model.path=runs/paper-grpo image=street.jpg depth=street-depth.png question='Which car is nearer?'
             sif-jax generate --depth none model.path=runs/paper-grpo image=street.jpg question='Which car is nearer?'
    """
    from sif_jax.api import load
    from sif_jax.models.qwen2_5_vl.chat import messages_with_images
    from sif_jax.sif.prompts import user_text
    from sif_jax.training.trace_picture import save_traces

    text = user_text(config.question, config.depth_shown, config.prompt.with_depth_words)
    messages = messages_with_images([{"role": "user", "content": text}], config.images)
    vlm = load(
        **config.model.model_dump(include={"path", "adapter", "dtype", "min_pixels", "max_pixels", "other_pixels"})
    )
    completions = [completion.text for completion in vlm.generate(messages, **config.sampling.model_dump())]
    for completion in completions:
        click.echo(completion)
    for file in save_traces(completions, config.images, config.picture):
        click.echo(f"drawn: {file}", err=True)


@command(main, "export", ExportConfig)
def export(config: ExportConfig) -> None:
    """Write a run, or a checkpoint with an adapter, as a Hugging Face model or a PEFT adapter.

    \b
    Example: sif-jax export path=runs/paper-sft out=exports/sft
             sif-jax export path=runs/paper-sft out=exports/sft-lora format=adapter
             sif-jax export path=ckpt/Qwen2.5-VL-7B-Instruct adapter=some-peft-adapter out=exports/merged dtype=bfloat16
    """
    from sif_jax.training.export import export

    click.echo(export(config))


def report_inputs(run: RunName, model_path: str, data: DataConfig) -> int:
    """Print what a command would read; returns the number of records."""
    from sif_jax.sif.record import read_records

    file = read_records(data.path, image_root=data.image_root, on_error=data.on_error)
    rows = len(file.records) if data.limit is None else min(len(file.records), data.limit)
    if not rows:
        raise InputError("no records to use", file=data.path, expected="at least one")
    started = "resumes" if (run.directory / "config.yaml").exists() else "new"
    found = "found" if Path(model_path).is_dir() else "no such directory here"
    click.echo(f"run    {run.directory} ({started})\nmodel  {model_path} ({found})")
    click.echo(f"data   {data.path}: {rows} records, {len(file.skipped)} rows skipped")
    return rows


def report_steps(rows: int, epochs: int, rows_per_step: int, max_steps: int | None) -> None:
    steps = max_steps or max(rows * epochs // rows_per_step, 1)
    click.echo(f"steps  {steps} of {rows_per_step} records")
