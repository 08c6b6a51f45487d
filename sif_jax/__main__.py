"""`python -m sif_jax` is the command `sif-jax`, in a checkout that is not installed, too (io)."""

from sif_jax.cli import main

if __name__ == "__main__":
    main(prog_name="sif-jax")
