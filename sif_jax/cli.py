"""The `sif-jax` commands: a YAML config, key=value overrides, one clear line per mistake (io)."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click
from pydantic import BaseModel

from sif_jax import __version__
from sif_jax.config import (
    AblationConfig,
    DataConfig,
    DecodeBenchConfig,
    DemoConfig,
    EvalConfig,
    ExportConfig,
    GenerateConfig,
    GrpoConfig,
    HacksBenchConfig,
    PrecisionBenchConfig,
    RematBenchConfig,
    RewardsBenchConfig,
    RunName,
    ScenesBuildConfig,
    SftConfig,
    TrainBenchConfig,
    config_text,
    describe,
    load_config,
)
from sif_jax.errors import PREEMPTED_EXIT_CODE, InputError, PreemptedError
from sif_jax.parallel.host_memory import keep_freed_memory

Kind = TypeVar("Kind", bound=BaseModel)


class _Group(click.Group):
    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except InputError as error:
            click.echo(f"error: {error}", err=True)
            ctx.exit(2)
        except PreemptedError as stop:
            click.echo(str(stop), err=True)
            ctx.exit(int(os.environ.get(PREEMPTED_EXIT_CODE, "0")))
        except KeyboardInterrupt:
            click.echo("interrupted", err=True)
            ctx.exit(130)


class _ConfigCommand(click.Command):
    """A command whose help lists the keys of its config."""

    def __init__(self, *args: Any, kind: type[BaseModel], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.kind = kind

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Keys (KEY=VALUE, or in CONFIG.yaml)"):
            formatter.write_dl(
                [
                    (row.key, f"{row.description}  [{row.type}; {_default_text(row.default)}]")
                    for row in describe(self.kind)
                ]
            )


def _default_text(default: str | None) -> str:
    return "required" if default is None else f"default {default}"


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.version_option(__version__)
def main() -> None:
    """SIFThinker in JAX: spatially-aware image focus with Qwen2.5-VL, LoRA SFT and GRPO-SIF.

    \b
    Every command reads CONFIG.yaml, then KEY=VALUE overrides; COMMAND --help lists the keys.
    Example: sif-jax sft configs/paper/sft.yaml optimizer.learning_rate=5e-5 run.name=lower-lr
    """


@main.group()
def data() -> None:
    """Build and check records files."""


@main.group()
def bench() -> None:
    """Measure memory, time and precision on this machine."""


def _command(
    group: click.Group, name: str, kind: type[Kind], *, as_keys: Sequence[str] = ()
) -> Callable[[Callable[..., None]], click.Command]:
    """Register a function of a config (and of its own options) as a command; options `as_keys` set the key of their name."""

    def decorate(function: Callable[..., None]) -> click.Command:
        @functools.wraps(function)
        def run(words: Sequence[str], print_config: bool, **options: Any) -> None:
            given = {name: options.pop(name) for name in as_keys}
            config = _config(kind, [*words, *(f"{name}={value}" for name, value in given.items() if value is not None)])
            if print_config:
                click.echo(config_text(config), nl=False)
            else:
                keep_freed_memory()
                os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # that PyTorch is absent is meant so
                function(config, **options)

        run = click.option("--print-config", is_flag=True, help="Print the whole config as YAML and exit.")(run)
        run = click.argument("words", nargs=-1, metavar="[CONFIG.yaml] [KEY=VALUE]...")(run)
        return group.command(name, cls=_ConfigCommand, kind=kind)(run)

    return decorate


def _config(kind: type[Kind], words: Sequence[str]) -> Kind:
    paths = [word for word in words if "=" not in word]
    if len(paths) > 1:
        raise InputError("more than one config", file="command line", value=paths, expected="one CONFIG.yaml")
    return load_config(kind, paths[0] if paths else None, [word for word in words if "=" in word])


_dry_run = click.option("--dry-run", is_flag=True, help="Check the config, the data and the model's path, and exit.")


@_command(main, "demo", DemoConfig)
def demo(config: DemoConfig) -> None:
    """Run the whole path on a tiny random model: scenes, SFT, GRPO-SIF, evaluation.

    Run it in the root of the checkout. It takes a few minutes on a CPU.

    \b
    Example: sif-jax demo configs/demo/demo.yaml
    """
    from sif_jax.demo import run

    click.echo(run(config))


@_command(main, "sft", SftConfig)
@_dry_run
def sft(config: SftConfig, dry_run: bool) -> None:
    """Fine-tune on the chains of thought (or the bare answers) of a records file.

    The same command resumes a run that was stopped.

    \b
    Example: sif-jax sft configs/paper/sft.yaml data.path=data/SIF-50K.json model.path=ckpt/Qwen2.5-VL-7B-Instruct
    """
    if dry_run:
        rows = _report_inputs(config.run, config.model.path, config.data)
        _report_steps(rows, config.epochs, config.batch_size * config.accumulation, config.max_steps)
        return
    from sif_jax.parallel.job import Job
    from sif_jax.training.sft import train

    with Job():
        click.echo(train(config))


@_command(main, "grpo", GrpoConfig)
@_dry_run
def grpo(config: GrpoConfig, dry_run: bool) -> None:
    """Reinforce with GRPO-SIF: rewards for format, answer, boxes and depth.

    The same command resumes a run that was stopped.

    \b
    Example: sif-jax grpo configs/paper/grpo.yaml model.path=runs/paper-sft num_samples=16
    """
    if dry_run:
        rows = _report_inputs(config.run, config.model.path, config.data)
        _report_steps(rows, config.epochs, config.prompts_per_step, config.max_steps)
        return
    from sif_jax.parallel.job import Job
    from sif_jax.training.grpo import train

    with Job():
        click.echo(train(config))


@_command(main, "eval", EvalConfig)
@_dry_run
def eval_(config: EvalConfig, dry_run: bool) -> None:
    """Score a model on a records file: greedy and strict.

    \b
    Example: sif-jax eval configs/paper/eval.yaml model.path=runs/paper-grpo data.path=data/test.json
    """
    if dry_run:
        _report_inputs(config.run, config.model.path, config.data)
        return
    from sif_jax.evals.evaluate import evaluate
    from sif_jax.parallel.job import Job

    with Job():
        click.echo(evaluate(config))


@_command(main, "ablate", AblationConfig)
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


@_command(main, "generate", GenerateConfig, as_keys=("depth", "overlay"))
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


@_command(main, "export", ExportConfig)
def export(config: ExportConfig) -> None:
    """Write a run, or a checkpoint with an adapter, as a Hugging Face model or a PEFT adapter.

    \b
    Example: sif-jax export path=runs/paper-sft out=exports/sft
             sif-jax export path=runs/paper-sft out=exports/sft-lora format=adapter
             sif-jax export path=ckpt/Qwen2.5-VL-7B-Instruct adapter=some-peft-adapter out=exports/merged dtype=bfloat16
    """
    from sif_jax.training.export import export

    click.echo(export(config))


@_command(data, "build", ScenesBuildConfig)
def build(config: ScenesBuildConfig) -> None:
    """Render SIF-Scenes: images with exact depth, boxes, questions and chains of thought.

    \b
    Example: sif-jax data build out=data/scenes splits='{train: 400, test: 50}' seed=0 workers=4
    """
    from sif_jax.data.scenes.build import build_scenes
    from sif_jax.data.scenes.config import FAMILIES, ScenesConfig

    scenes = ScenesConfig(
        families=tuple((family, 1.0) for family in config.families or FAMILIES),
        questions_per_scene=config.questions_per_scene,
        distractor_rate=config.distractor_rate,
    )
    for path in build_scenes(config.out, scenes, config.splits, config.seed, config.workers).values():
        click.echo(path)


@data.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--image-root", type=click.Path(path_type=Path), help="Folder of the images; default: FILE's own folder.")
def check(file: Path, image_root: Path | None) -> None:
    """Read every row of a records FILE, open every image, parse every chain of thought; exit with 2 on any problem.

    \b
    Example: sif-jax data check data/scenes/train.json
    """
    from sif_jax.data.check import check_file

    report = check_file(file, image_root=image_root)
    click.echo(
        f"{report.num_rows} rows, {report.num_depth_images} depth images, {report.num_gold_boxes} gold boxes, "
        f"{report.num_completions} chains of thought, {len(report.problems)} problems"
    )
    for problem in report.problems:
        click.echo(problem)
    if report.problems:
        raise click.exceptions.Exit(2)


_json = click.option("--json", "json_only", is_flag=True, help="Print only the line of JSON.")


@_command(bench, "remat", RematBenchConfig)
@click.option(
    "--compile-only", is_flag=True, help="Memory and matrix products from the compiled programs; nothing runs."
)
@_json
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


@_command(bench, "precision", PrecisionBenchConfig)
@_json
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


@_command(bench, "rewards", RewardsBenchConfig)
@_json
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


@_command(bench, "hacks", HacksBenchConfig)
@_json
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


@_command(bench, "decode", DecodeBenchConfig)
@click.option("--against", type=click.Choice(["none", "hf"]), default="none", help="hf: transformers' generate, too.")
@_json
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


@_command(bench, "train", TrainBenchConfig)
@click.option("--against", type=click.Choice(["none", "hf"]), default="none", help="hf: transformers and PEFT, too.")
@_json
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


@main.command()
@click.argument("words", nargs=-1, metavar="CONFIG.yaml [KEY=VALUE]...")
@click.option("--topology", required=True, help="v5e:4x4, v5p:2x2x4, v6e:8x8, v5e-16, v5p-32 (16 chips), gpu:h20x8, …")
@click.option("--model", metavar="3B|7B|32B|72B|DIR", help="By its config.json; default: the config's model.path.")
@click.option("--search", is_flag=True, help="Try other meshes, micro-batches and remat policies; propose the best.")
@click.option("--tries", default=3, show_default=True, help="Candidates of --search that are compiled.")
@click.option("--completion-tokens", type=int, help="GRPO: expected tokens of the longest completion of a step.")
@click.option("--analytic", is_flag=True, help="Formulas alone: seconds, and no compiler is needed.")
@_json
def plan(
    words: Sequence[str],
    topology: str,
    model: str | None,
    search: bool,
    tries: int,
    completion_tokens: int | None,
    analytic: bool,
    json_only: bool,
) -> None:
    """Compile every program of a run for TPUs or GPUs that are not here, and say whether it fits and how fast it could be.

    Exit code 1: it does not fit. The last line is one JSON object.

    \b
    Example: sif-jax plan configs/paper/sft.yaml --topology v5e-16 --model 7B mesh.fsdp=16
             sif-jax plan configs/paper/grpo.yaml --topology v5p:2x2x4 --model 72B --search
    """
    from sif_jax.plan.topology import set_environment

    set_environment()
    from sif_jax.plan.command import run

    text, fits = run(
        words,
        topology=topology,
        model=model,
        tries=tries if search else 0,
        completion_tokens=completion_tokens,
        analytic=analytic,
        json_only=json_only,
    )
    click.echo(text)
    if not fits:
        raise click.exceptions.Exit(1)


def _report_inputs(run: RunName, model_path: str, data: DataConfig) -> int:
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


def _report_steps(rows: int, epochs: int, rows_per_step: int, max_steps: int | None) -> None:
    steps = max_steps or max(rows * epochs // rows_per_step, 1)
    click.echo(f"steps  {steps} of {rows_per_step} records")


if __name__ == "__main__":
    main()
