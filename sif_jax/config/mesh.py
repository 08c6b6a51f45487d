"""How a job's devices are laid out (host)."""

from __future__ import annotations

from pydantic import Field, model_validator

from sif_jax.config.section import Config
from sif_jax.errors import InputError

AXES = ("data", "fsdp", "sequence", "tensor")  # the last varies fastest: its devices are the nearest neighbours


class MeshConfig(Config):
    """The four numbers multiply to the job's devices; one of them may be -1."""

    data: int = Field(default=-1, description="devices along which rows are split; -1: all that the others leave")
    fsdp: int = Field(
        default=1, description="devices along which rows, weights and optimizer are split; -1: what is left"
    )
    tensor: int = Field(
        default=1, description="devices along which heads, ffn and vocabulary are split; -1: what is left"
    )
    sequence: int = Field(default=1, description="devices along which the tokens of a row are split; -1: what is left")

    @model_validator(mode="after")
    def _sizes_are_sizes(self) -> MeshConfig:
        sizes = {axis: getattr(self, axis) for axis in AXES}
        for axis, size in sizes.items():
            if size < 1 and size != -1:
                raise InputError(f"mesh.{axis} is no number of devices", value=size, expected="1 or more, or -1")
        if list(sizes.values()).count(-1) > 1:
            raise InputError(
                "two mesh axes are -1", value=sizes, expected="one at most", fix="give one of them a number"
            )
        return self
