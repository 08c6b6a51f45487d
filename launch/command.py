"""The command to launch, checked here before any machine is asked for (host)."""

from __future__ import annotations

from collections.abc import Sequence

import click

from sif_jax.cli import main as cli
from sif_jax.config import load_config
from sif_jax.errors import InputError


def check_command(words: Sequence[str]) -> None:
    """
    Raises:
      InputError: no command, an unknown one, or a config that the command would refuse on every host.
    """
    command, rest = _find(words)
    kind = getattr(command, "kind", None)
    if kind is None:
        return
    values = [word for word in rest if not word.startswith("-")]
    configs = [word for word in values if "=" not in word]
    if len(configs) > 1:
        raise InputError("more than one config", file="command line", value=configs, expected="one CONFIG.yaml")
    load_config(kind, configs[0] if configs else None, [word for word in values if "=" in word])


def _find(words: Sequence[str]) -> tuple[click.Command, list[str]]:
    command: click.Command = cli
    rest = list(words)
    while isinstance(command, click.Group):
        known = f"one of {', '.join(sorted(command.commands))}"
        if not rest:
            fix = "add it, as in sft configs/paper/sft.yaml"
            raise InputError("no command to launch", file="command line", expected=known, fix=fix)
        word = rest.pop(0)
        if word not in command.commands:
            raise InputError("unknown command", file="command line", value=word, expected=known)
        command = command.commands[word]
    return command, rest
