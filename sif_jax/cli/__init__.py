"""The `sif-jax` commands; importing their modules registers them (io)."""

from sif_jax.cli import benches, plans, records, runs
from sif_jax.cli.command import main

__all__ = ["benches", "main", "plans", "records", "runs"]
