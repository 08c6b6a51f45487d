"""`sif-jax plan` (io)."""

from __future__ import annotations

from collections.abc import Sequence

import click

from sif_jax.cli.command import json_option, main


@main.command()
@click.argument("words", nargs=-1, metavar="CONFIG.yaml [KEY=VALUE]...")
@click.option("--topology", required=True, help="v5e:4x4, v5p:2x2x4, v6e:8x8, v5e-16, v5p-32 (16 chips), gpu:h20x8, …")
@click.option("--model", metavar="3B|7B|32B|72B|DIR", help="By its config.json; default: the config's model.path.")
@click.option(
    "--search",
    is_flag=True,
    help="Try other meshes, micro-batches and remat policies; propose the best, or what lacks least.",
)
@click.option("--tries", default=3, show_default=True, help="Candidates of --search that are compiled.")
@click.option("--completion-tokens", type=int, help="GRPO: expected tokens of the longest completion of a step.")
@click.option("--analytic", is_flag=True, help="Formulas alone: seconds, and no compiler is needed.")
@json_option
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
