"""What uses a trained model: evaluation, generation, export (host)."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt, model_validator

from sif_jax.config.inputs import DataConfig, ModelConfig, PromptConfig, TruncationConfig, check_images_fit
from sif_jax.config.mesh import MeshConfig
from sif_jax.config.section import Config
from sif_jax.config.training import RunName
from sif_jax.errors import InputError

NONE = "none"


class EvalConfig(Config):
    run: RunName
    model: ModelConfig
    prompt: PromptConfig = PromptConfig()
    data: DataConfig
    max_new_tokens: PositiveInt = Field(default=2048, description="longest completion, tokens")
    batch_size: PositiveInt = Field(default=8, description="prompts per forward pass, over the whole job")
    temperature: NonNegativeFloat = Field(default=0.0, description="sampling temperature; 0: greedy")
    scoring: Literal["strict"] = Field(default="strict", description="an answer that cannot be parsed is wrong")
    target: Literal["cot", "answer"] = Field(
        default="cot", description="what the model was trained to write; answer: the whole completion is the answer"
    )
    mesh: MeshConfig = MeshConfig()

    @model_validator(mode="after")
    def _images_fit(self) -> EvalConfig:
        check_images_fit(self.model, self.prompt, self.data.buckets)
        return self


class SamplingConfig(TruncationConfig):
    max_new_tokens: PositiveInt = Field(default=2048, description="longest completion, tokens")
    num_samples: PositiveInt = Field(default=1, description="completions")
    temperature: NonNegativeFloat = Field(default=0.0, description="sampling temperature; 0: greedy")
    stop: tuple[str, ...] = Field(default=(), description="strings that end a completion; they are not in its text")
    max_length: PositiveInt | None = Field(
        default=None, description="prompt and completion, tokens; null: what the model was made for"
    )
    seed: NonNegativeInt = Field(default=0, description="seed of the sampler")


class GenerateConfig(Config):
    model: ModelConfig
    prompt: PromptConfig = PromptConfig()
    image: str = Field(description="image file")
    depth: str | None = Field(
        default=None, description="depth image file (near = 0); none: the prompt shows the image alone"
    )
    overlay: str | None = Field(
        default=None, description="picture to write, with the trace drawn; null: IMAGE-trace.png here; none: no picture"
    )
    question: str = Field(description="the question, without the format instructions")
    sampling: SamplingConfig = SamplingConfig()

    @model_validator(mode="after")
    def _depth_is_given(self) -> GenerateConfig:
        if self.prompt.depth_input and self.depth is None:
            raise InputError(
                "the prompt shows a depth image, and none is given",
                value="prompt.depth_input=true",
                expected="depth=FILE",
                fix="give depth=FILE, or depth=none",
            )
        return self

    @property
    def images(self) -> list[str]:
        """What the prompt shows."""
        return [self.image, self.depth] if self.depth_shown and self.depth else [self.image]

    @property
    def depth_shown(self) -> bool:
        return self.prompt.depth_input and self.depth != NONE

    @property
    def picture(self) -> Path | None:
        """Where the trace is drawn."""
        if self.overlay is None:
            return Path(f"{Path(self.image).stem}-trace.png")
        return None if self.overlay == NONE else Path(self.overlay)


class ExportConfig(Config):
    path: str = Field(description="what to export: a run of ours, a Hugging Face checkpoint or a PEFT adapter")
    out: str = Field(description="directory to write; must not exist")
    format: Literal["merged", "adapter"] = Field(
        default="merged", description="a whole Hugging Face model with adapters folded in, or a PEFT adapter alone"
    )
    adapter: str | None = Field(default=None, description="PEFT adapter to lay over a Hugging Face checkpoint")
    step: PositiveInt | None = Field(default=None, description="which checkpoint of a run; null: the latest")
    dtype: Literal["float32", "bfloat16"] | None = Field(
        default=None, description="dtype of a merged model's weights; null: the run's, or the checkpoint's own"
    )
