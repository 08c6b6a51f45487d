"""What every training can be told, and SFT (host)."""

from __future__ import annotations

import re
from pathlib import Path
from typing import ClassVar, Literal

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    field_validator,
    model_validator,
)

from sif_jax.config.inputs import DataConfig, ModelConfig, PromptConfig, check_images_fit
from sif_jax.config.mesh import MeshConfig
from sif_jax.config.section import Config, Fraction, OpenFraction
from sif_jax.errors import InputError


class LoraConfig(Config):
    rank: PositiveInt = Field(default=8, description="rank of the adapters")
    alpha: PositiveFloat = Field(default=16.0, description="scale: the adapter's output is multiplied by alpha / rank")
    dropout: OpenFraction = Field(default=0.0, description="dropout probability at the adapter's input")
    targets: str | tuple[str, ...] = Field(
        default="all-linear",
        description="all-linear, language, a regex that matches whole module names of transformers, or a list of names",
    )

    @field_validator("targets", mode="before")
    @classmethod
    def _targets_are_names_or_a_regex(cls, targets: object) -> object:
        names = targets if isinstance(targets, list | tuple) else [targets]
        if not names or not all(isinstance(name, str) and name for name in names):
            expected = "all-linear, language, a regex or a list such as [q_proj, v_proj]"
            raise InputError("not targets", value=targets, expected=expected)
        if isinstance(targets, str):
            try:
                re.compile(targets)
            except re.error as error:
                raise InputError(f"{error}", value=targets, expected="all-linear, language or a regex") from None
        return targets


class OptimizerConfig(Config):
    learning_rate: PositiveFloat = Field(description="peak learning rate")
    schedule: Literal["cosine", "constant", "linear"] = Field(default="cosine", description="decay after the warm-up")
    warmup_ratio: OpenFraction = Field(default=0.0, description="share of all steps spent warming up linearly from 0")
    min_lr_ratio: Fraction = Field(default=0.0, description="final learning rate, share of the peak")
    weight_decay: NonNegativeFloat = Field(
        default=0.0, description="decoupled (AdamW); biases and norm scales are exempt"
    )
    b1: OpenFraction = Field(default=0.9, description="decay of the first moment")
    b2: OpenFraction = Field(default=0.999, description="decay of the second moment")
    eps: PositiveFloat = Field(default=1e-8, description="added to the root of the second moment")
    max_grad_norm: PositiveFloat | None = Field(
        default=1.0, description="clip gradients to this global norm; null: no clipping"
    )


class RunName(Config):
    name: str = Field(description="the run's directory is root/name")
    root: str = Field(default="runs", description="directory that holds the runs")
    seed: NonNegativeInt = Field(default=0, description="every random key of the run derives from it")

    @field_validator("name")
    @classmethod
    def _is_one_directory(cls, name: str) -> str:
        if not re.fullmatch(r"\w[\w.-]*", name):
            raise InputError("not a directory name", value=name, expected="letters, digits, '_', '.', '-'")
        return name

    @property
    def directory(self) -> Path:
        return Path(self.root) / self.name


class KeepBestConfig(Config):
    metric: str = Field(
        description="what checkpoints are ranked by: the mean of this metric since the one before, such as loss or reward/total"
    )
    mode: Literal["max", "min"] = Field(description="which values are good")
    count: PositiveInt = Field(default=1, description="best checkpoints kept, beside the newest")


class RunConfig(RunName):
    resume: Literal["auto", "never", "must"] = Field(
        default="auto", description="auto: continue a run that exists; never: refuse one; must: refuse to start afresh"
    )
    log_every: PositiveInt = Field(default=1, description="steps between lines of metrics.jsonl")
    save_every: PositiveInt = Field(default=100, description="steps between checkpoints")
    keep: PositiveInt = Field(default=3, description="newest checkpoints kept")
    keep_best: KeepBestConfig | None = Field(default=None, description="null: the newest checkpoints alone")
    samples_every: PositiveInt | None = Field(
        default=50, description="GRPO: steps between tables of completions with their traces drawn; null: none"
    )
    tensorboard: bool = Field(default=True, description="write TensorBoard event files to the run's directory")
    wandb: bool = Field(default=False, description="also log to Weights & Biases (pip install wandb)")


class TrainConfig(Config):
    """What SFT and GRPO share."""

    RANKS: ClassVar[tuple[str, ...]] = ()  # the metrics that say how good weights are

    run: RunConfig
    model: ModelConfig
    lora: LoraConfig | None = Field(default=None, description="null: full fine-tune")
    freeze_vision: bool = Field(default=True, description="leave the vision tower untouched: no adapters, no updates")
    prompt: PromptConfig = PromptConfig()
    data: DataConfig
    optimizer: OptimizerConfig
    mesh: MeshConfig = MeshConfig()

    @model_validator(mode="after")
    def _vision_is_frozen_or_adapted(self) -> TrainConfig:
        if self.lora and self.lora.targets == "language" and not self.freeze_vision:
            raise InputError(
                "lora.targets=language adapts nothing in the vision tower",
                value="freeze_vision=false",
                expected="freeze_vision=true",
                fix="set freeze_vision=true, or lora.targets=all-linear",
            )
        return self

    @model_validator(mode="after")
    def _checkpoints_are_ranked_by_what_is_measured(self) -> TrainConfig:
        best = self.run.keep_best
        if best is not None and best.metric not in self.RANKS:
            raise InputError(
                "run.keep_best.metric is not a metric that checkpoints are ranked by",
                value=best.metric,
                expected=f"one of {', '.join(self.RANKS)}",
            )
        return self

    @model_validator(mode="after")
    def _images_fit(self) -> TrainConfig:
        check_images_fit(self.model, self.prompt, self.data.buckets)
        return self


class SftConfig(TrainConfig):
    RANKS = ("loss", "token_accuracy", "grad_norm")

    target: Literal["cot", "answer"] = Field(
        default="cot", description="train on the chain of thought, or the bare answer"
    )
    epochs: PositiveInt = Field(default=3, description="passes over the data")
    max_steps: PositiveInt | None = Field(
        default=None, description="optimizer steps, whatever epochs says; null: from epochs"
    )
    batch_size: PositiveInt = Field(default=16, description="rows per micro-step, over the whole job")
    accumulation: PositiveInt = Field(default=1, description="micro-steps per optimizer step")
    packing: bool = Field(default=False, description="put several examples in one row; needs max_steps")

    @model_validator(mode="after")
    def _packing_has_an_end(self) -> SftConfig:
        if self.packing and self.max_steps is None:
            raise InputError(
                "how many rows packing makes is not known beforehand",
                value="packing=true",
                expected="max_steps",
                fix="set max_steps, about a half to a quarter of records x epochs / (batch_size x accumulation)",
            )
        return self
