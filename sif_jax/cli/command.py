"""What every `sif-jax` command shares: a YAML config, key=value overrides, one clear line per mistake (io)."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import click
from pydantic import BaseModel

from sif_jax import __version__
from sif_jax.config import config_text, describe, load_config
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


def command(
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


json_option = click.option("--json", "json_only", is_flag=True, help="Print only the line of JSON.")
