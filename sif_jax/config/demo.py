"""SIF-Scenes, the tiny random model and the demo (host)."""

from __future__ import annotations

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from sif_jax.config.section import Config, Fraction
from sif_jax.errors import InputError


class ScenesBuildConfig(Config):
    out: str = Field(description="directory to write: SPLIT.json and the images")
    splits: dict[str, PositiveInt] = Field(description="scenes per split, such as {train: 400, test: 50}")
    seed: NonNegativeInt = Field(default=0, description="the same seed builds the same files")
    workers: PositiveInt = Field(default=1, description="processes that render")
    questions_per_scene: PositiveInt = Field(default=1, description="rows per scene, each of another family")
    families: tuple[str, ...] | None = Field(default=None, description="question families; null: all")
    distractor_rate: Fraction = Field(default=0.5, description="share of rows that first look at a wrong place")


def _check_divides(part: str, divisor: int, whole: str, value: int) -> None:
    if value % divisor:
        raise InputError(f"{part} does not divide {whole}", value=value, expected=f"a multiple of {divisor}")


class TinyVisionConfig(Config):
    depth: PositiveInt = Field(default=2, description="vision blocks")
    hidden_size: PositiveInt = Field(default=96, description="width of the vision tower")
    intermediate_size: PositiveInt = Field(default=192, description="width of its feed-forward layers")
    num_heads: PositiveInt = Field(default=2, description="attention heads of the vision tower")
    window_size: PositiveInt = Field(default=56, description="side of an attention window, pixels; 28 divides")
    fullatt_block_indexes: tuple[NonNegativeInt, ...] = Field(
        default=(1,), description="blocks that attend to whole images"
    )

    @model_validator(mode="after")
    def _is_consistent(self) -> TinyVisionConfig:
        _check_divides("vision.num_heads x 4", 4 * self.num_heads, "vision.hidden_size", self.hidden_size)
        _check_divides("a merged patch's side", 28, "vision.window_size", self.window_size)
        beyond = [index for index in self.fullatt_block_indexes if index >= self.depth]
        if beyond:
            raise InputError("no such vision block", value=beyond[0], expected=f"an index below {self.depth}")
        return self


class TinyModelConfig(Config):
    vocab_size: PositiveInt = Field(default=512, description="tokens of the tokenizer trained on the demo's own text")
    hidden_size: PositiveInt = Field(default=128, description="width of the decoder")
    intermediate_size: PositiveInt = Field(default=384, description="width of its feed-forward layers")
    num_hidden_layers: PositiveInt = Field(default=3, description="decoder layers")
    num_attention_heads: PositiveInt = Field(default=2, description="query heads")
    num_key_value_heads: PositiveInt = Field(default=1, description="key and value heads")
    max_pixels: PositiveInt = Field(default=11760, description="largest image, pixels")
    vision: TinyVisionConfig = TinyVisionConfig()

    @model_validator(mode="after")
    def _is_consistent(self) -> TinyModelConfig:
        _check_divides("2 x num_attention_heads", 2 * self.num_attention_heads, "hidden_size", self.hidden_size)
        _check_divides("num_key_value_heads", self.num_key_value_heads, "num_attention_heads", self.num_attention_heads)
        return self


class DemoScenesConfig(Config):
    sft: PositiveInt = Field(default=1400, description="scenes to fine-tune on")
    grpo: PositiveInt = Field(default=54, description="scenes to reinforce on")
    test: PositiveInt = Field(default=200, description="scenes held out")
    questions_per_scene: PositiveInt = Field(default=4, description="questions about each scene, of different families")
    sizes_px: tuple[tuple[PositiveInt, PositiveInt], ...] = Field(
        default=((224, 168), (168, 224), (280, 168)), description="(width, height) of the pictures; 56 divides"
    )
    max_areas: PositiveInt = Field(default=3, description="areas of a chain of thought, the whole image included")
    workers: PositiveInt = Field(default=2, description="processes that render")


class DemoConfig(Config):
    seed: NonNegativeInt = Field(default=0, description="seed of the scenes and of the random weights")
    root: str = Field(default="runs/demo", description="directory of everything the demo writes")
    scenes: DemoScenesConfig = DemoScenesConfig()
    tiny_model: TinyModelConfig = TinyModelConfig()
    sft: str = Field(default="configs/demo/sft.yaml", description="config of the fine-tuning")
    grpo: str = Field(default="configs/demo/grpo.yaml", description="config of the reinforcement learning")
    eval: str = Field(default="configs/demo/eval.yaml", description="config of the evaluations")
