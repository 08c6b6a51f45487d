"""`python -m sif_jax.cli` (io)."""

from sif_jax.cli import main

if __name__ == "__main__":
    main(prog_name="sif-jax")
