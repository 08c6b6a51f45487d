"""What a worker of a bench may be asked for and fails at; imports next to nothing, as each worker imports it anew."""

import os

from sif_jax.errors import InputError


def fail() -> None:
    raise InputError("no such thing", value=3)


def die() -> None:
    os._exit(9)
