"""What a run reads: a checkpoint, prompts and records, and the shapes of their batches (host)."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, NonNegativeInt, PositiveInt, field_validator, model_validator

from sif_jax.config.section import Config
from sif_jax.errors import InputError

PATCH_PIXELS = 14 * 14  # Qwen2.5-VL's vision patch


class ModelConfig(Config):
    path: str = Field(description="Hugging Face checkpoint, PEFT adapter, or a run of ours (a directory)")
    adapter: str | None = Field(default=None, description="PEFT adapter to lay over it (a directory); null: none")
    dtype: Literal["float32", "bfloat16"] = Field(default="bfloat16", description="storage of the frozen base weights")
    min_pixels: PositiveInt | None = Field(
        default=None, description="smallest image, pixels; null: from the checkpoint"
    )
    max_pixels: PositiveInt | None = Field(default=None, description="largest image, pixels; null: from the checkpoint")
    other_pixels: bool = Field(
        default=False, description="allow pixel limits other than those the checkpoint was trained with"
    )
    remat: Literal["none", "full", "dots"] = Field(
        default="full", description="activations recomputed in the backward pass"
    )
    scan_layers: bool = Field(
        default=True,
        description="compile one decoder layer and loop over it; false: write all out, each with arrays of its own: "
        "faster on a GPU, no second copy in a rollout, longer to compile",
    )
    attention: Literal["auto", "xla", "flash", "splash", "cudnn"] = Field(
        default="auto",
        description="kernel of self-attention; auto: splash on TPU and cudnn on GPU where they prove right, flash on CPU",
    )

    @model_validator(mode="after")
    def _pixels_are_ordered(self) -> ModelConfig:
        if self.min_pixels and self.max_pixels and self.min_pixels > self.max_pixels:
            raise InputError(
                "min_pixels is above max_pixels",
                value=self.min_pixels,
                expected=f"at most {self.max_pixels}",
                fix="lower min_pixels or raise max_pixels",
            )
        return self


class PromptConfig(Config):
    depth_input: bool = Field(default=True, description="show the depth image beside the original image")
    with_depth_words: bool = Field(
        default=True, description="say 'with depth' in the prompt, as the released SFT data does"
    )


class BucketsConfig(Config):
    """The shapes of a batch, one compiled program each: bucket i has rows of tokens[i] tokens and patches[i] patches."""

    tokens: tuple[PositiveInt, ...] = Field(
        default=(1024, 2048), description="tokens per row in each bucket, not descending"
    )
    patches: tuple[NonNegativeInt, ...] = Field(
        default=(2688, 2688), description="vision patches per row in each bucket, not descending, 4 divides"
    )

    @field_validator("tokens", "patches")
    @classmethod
    def _ascending(cls, sizes: tuple[int, ...]) -> tuple[int, ...]:
        if not sizes or list(sizes) != sorted(sizes):
            raise InputError("bucket sizes out of order", value=list(sizes), expected="one or more, not descending")
        return sizes

    @field_validator("patches")
    @classmethod
    def _whole_merge_units(cls, patches: tuple[int, ...]) -> tuple[int, ...]:
        odd = [size for size in patches if size % 4]
        if odd:
            raise InputError("2 x 2 patches merge into one token", value=odd[0], expected="a multiple of 4")
        return patches

    @model_validator(mode="after")
    def _are_distinct_pairs(self) -> BucketsConfig:
        if len(self.tokens) != len(self.patches):
            raise InputError(
                "a bucket is a pair of sizes",
                value=f"{len(self.tokens)} tokens, {len(self.patches)} patches",
                expected="lists of one length",
                fix="repeat a size, as in tokens=[1024, 2048] patches=[2688, 2688]",
            )
        if len(set(self.pairs)) < len(self.pairs):
            raise InputError("a bucket is listed twice", value=self.pairs, expected="distinct pairs")
        return self

    @property
    def pairs(self) -> tuple[tuple[int, int], ...]:
        """(tokens, patches) of each bucket; the last one holds whatever any other holds."""
        return tuple(zip(self.tokens, self.patches))


class DataConfig(Config):
    path: str = Field(description="records file (JSON, the released SIF-50K layout)")
    image_root: str | None = Field(
        default=None, description="folder of the images; null: the records file's own folder"
    )
    on_error: Literal["raise", "skip"] = Field(
        default="raise", description="a bad row stops the run, or is skipped and counted"
    )
    limit: PositiveInt | None = Field(default=None, description="read only the first rows, records; null: all")
    buckets: BucketsConfig = BucketsConfig()


class TruncationConfig(Config):
    """What sampling keeps of a distribution: top-k, of that top-p, of that min-p."""

    top_p: float = Field(
        default=1.0, gt=0, le=1, description="sample from the smallest set with this probability; 1: off"
    )
    top_k: NonNegativeInt = Field(default=0, description="sample from the k likeliest tokens; 0: off")
    min_p: float = Field(
        default=0.0, ge=0, le=1, description="sample from tokens at least so likely, relative to the likeliest; 0: off"
    )


def check_images_fit(model: ModelConfig, prompt: PromptConfig, buckets: BucketsConfig) -> None:
    images = 2 if prompt.depth_input else 1
    needed = images * 4 * ((model.max_pixels or 0) // (4 * PATCH_PIXELS))
    if needed > buckets.patches[-1]:
        raise InputError(
            f"data.buckets.patches is too small for {images} image(s) of model.max_pixels={model.max_pixels}",
            value=buckets.patches[-1],
            expected=f"at least {needed}",
            fix=f"raise the last bucket to {needed}, or lower model.max_pixels",
        )
