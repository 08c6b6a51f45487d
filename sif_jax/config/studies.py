"""Grids of runs, and the benches (host)."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt, model_validator

from sif_jax.config.inputs import DataConfig, ModelConfig, PromptConfig
from sif_jax.config.section import Config
from sif_jax.errors import InputError

Words = Annotated[tuple[str, ...], Field(min_length=1)]


class VariantConfig(Config):
    """KEY=VALUE words that go after those of the grid; null: this variant has no such stage."""

    all: tuple[str, ...] = Field(default=(), description="for each of its stages, such as prompt.depth_input=false")
    sft: tuple[str, ...] | None = Field(default=(), description="for its fine-tuning, such as target=answer")
    grpo: tuple[str, ...] | None = Field(default=(), description="for its reinforcement, such as rewards.bbox=0")
    eval: tuple[str, ...] = Field(default=(), description="for its evaluation, such as target=answer")


class AblationConfig(Config):
    root: str = Field(default="runs/ablation", description="directory of every run of the grid and of its table")
    sft: Words = Field(description="what would follow `sif-jax sft`: CONFIG.yaml, then KEY=VALUE words")
    grpo: Words = Field(description="what would follow `sif-jax grpo`; it starts from the variant's own SFT")
    eval: Words = Field(description="what would follow `sif-jax eval`; every variant answers the same records")
    variants: Annotated[dict[str, VariantConfig], Field(min_length=1)] = Field(
        description="name → further words per stage; differences are taken from the first"
    )


class RematBenchConfig(Config):
    architecture: str = Field(
        default="configs/bench/100M", description="directory with the config.json of the shapes; no weights are read"
    )
    dtype: Literal["float32", "bfloat16"] = Field(
        default="float32",
        description="storage of the frozen weights; XLA on CPUs copies bfloat16 ones to float32 whole",
    )
    lora_rank: PositiveInt = Field(default=8, description="rank of the adapters")
    freeze_vision: bool = Field(default=True, description="no adapters in the vision tower, and no gradient through it")
    rows: PositiveInt = Field(default=1, description="rows of the batch")
    tokens: PositiveInt = Field(default=1024, description="tokens per row, two images included")
    image_px: tuple[PositiveInt, PositiveInt] = Field(
        default=(364, 252), description="(width, height) of each image; 28 divides"
    )
    steps: PositiveInt = Field(default=3, description="timed steps of each policy, taken in turns")


class PrecisionBenchConfig(Config):
    model: ModelConfig
    data: DataConfig | None = Field(default=None, description="records file; null: three built-in conversations")
    prompt: PromptConfig = PromptConfig()


class RewardsBenchConfig(Config):
    completions: PositiveInt = Field(default=512, description="completions of the batch")
    samples: PositiveInt = Field(default=8, description="completions that share a record and its depth map")
    areas: int = Field(default=8, ge=1, le=64, description="areas of each trace")
    boxes: int = Field(default=8, ge=1, le=64, description="boxes of each area, and gold boxes")
    map_px: PositiveInt = Field(default=512, description="side of the square depth maps, pixels")
    repeats: PositiveInt = Field(default=5, description="timed repeats of each way, taken in turns")
    seed: NonNegativeInt = Field(default=0, description="seed of the boxes and maps")


class HacksBenchConfig(Config):
    records: int = Field(default=2000, ge=16, description="random questions that every trick is tried on")
    seed: NonNegativeInt = Field(default=0, description="seed of the questions and of the honest policy")


class EnginesBenchConfig(Config):
    """Ours beside transformers, on one checkpoint and on rows with two images."""

    checkpoint: str | None = Field(
        default=None, description="Hugging Face checkpoint; null: random weights of the architecture"
    )
    architecture: str = Field(
        default="configs/bench/100M", description="directory with the config.json of the random weights"
    )
    image_px: tuple[PositiveInt, PositiveInt] = Field(
        default=(364, 252), description="(width, height) of each of a row's two images; 28 divides"
    )
    min_new_tokens: PositiveInt = Field(default=16, description="the shortest completion")
    max_new_tokens: PositiveInt = Field(default=256, description="the longest; lengths are spread evenly between")

    @model_validator(mode="after")
    def _lengths_are_ordered(self) -> EnginesBenchConfig:
        if self.min_new_tokens > self.max_new_tokens:
            raise InputError(
                "min_new_tokens is above max_new_tokens",
                value=self.min_new_tokens,
                expected=f"at most {self.max_new_tokens}",
            )
        return self


class DecodeBenchConfig(EnginesBenchConfig):
    dtype: Literal["float32", "bfloat16"] = Field(
        default="float32", description="weights and arithmetic of both engines"
    )
    prompts: PositiveInt = Field(default=8, description="prompts, of two images each")
    samples: PositiveInt = Field(default=8, description="completions of each prompt")
    tokens: PositiveInt = Field(default=278, description="tokens of each prompt, images included")
    decode_rows: PositiveInt | None = Field(default=48, description="completions decoded at once; null: all")
    prefill: PositiveInt | None = Field(default=None, description="prompts computed in one pass; null: all")
    temperature: NonNegativeFloat = Field(default=0.0, description="sampling temperature; 0: greedy, and compared")
    repeats: PositiveInt = Field(default=1, description="timed turns of each engine")
    seed: NonNegativeInt = Field(default=0, description="of the weights, the lengths and the samples")


class TrainBenchConfig(EnginesBenchConfig):
    dtype: Literal["float32", "bfloat16"] = Field(
        default="float32", description="frozen weights and arithmetic of both; adapters and moments are float32"
    )
    lora_rank: PositiveInt = Field(default=8, description="rank of the adapters, on every linear layer of the decoder")
    remat: Literal["none", "dots", "full"] = Field(
        default="none", description="what ours computes again in the backward pass"
    )
    hf_checkpointing: bool | None = Field(
        default=None, description="gradient checkpointing of transformers; null: where remat is not none"
    )
    scan_layers: bool = Field(default=True, description="ours; see model.scan_layers")
    attention: Literal["auto", "xla", "flash", "splash", "cudnn"] = Field(
        default="auto", description="ours; see model.attention"
    )
    stages: Annotated[tuple[Literal["sft", "grpo"], ...], Field(min_length=1)] = Field(
        default=("sft", "grpo"), description="which steps are measured"
    )
    rows: PositiveInt = Field(default=4, description="SFT: examples of the batch")
    tokens: PositiveInt = Field(default=1024, description="SFT: tokens of each example and of a row, images included")
    min_tokens: PositiveInt | None = Field(
        default=None,
        description="SFT: the shortest example, others evenly up to tokens; ours packs them, transformers pads. null: all equal",
    )
    prompts: PositiveInt = Field(default=2, description="GRPO: prompts of the update")
    samples: int = Field(default=8, ge=2, description="GRPO: completions of each prompt")
    prompt_tokens: PositiveInt = Field(default=278, description="GRPO: tokens of each prompt, images included")
    min_new_tokens: PositiveInt = Field(default=64, description="GRPO: the shortest completion")
    micro_batch: PositiveInt | None = Field(
        default=None, description="GRPO: prompts that ours computes at once; null: all"
    )
    hf_rows: PositiveInt | None = Field(
        default=None, description="GRPO: completions that transformers computes at once; null: all"
    )
    steps: PositiveInt = Field(default=5, description="timed steps of each")
    in_turns: bool = Field(
        default=True,
        description="step by step, both in memory, for a machine that does other work; false: one after the other",
    )
    seed: NonNegativeInt = Field(default=0, description="of the weights, the tokens and the lengths")

    @model_validator(mode="after")
    def _parts_are_whole(self) -> TrainBenchConfig:
        completions = self.prompts * self.samples
        for name, part, whole in [
            ("micro_batch", self.micro_batch, self.prompts),
            ("hf_rows", self.hf_rows, completions),
        ]:
            if part and whole % part:
                raise InputError(f"{name} leaves a rest", value=part, expected=f"a divisor of {whole}")
        if self.min_tokens and self.min_tokens > self.tokens:
            raise InputError("min_tokens is above tokens", value=self.min_tokens, expected=f"at most {self.tokens}")
        return self
