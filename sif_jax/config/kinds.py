"""What every command can be told: frozen, validated sections with their units and defaults (host)."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    JsonValue,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    field_validator,
    model_validator,
)

from sif_jax.errors import InputError

PATCH_PIXELS = 14 * 14  # Qwen2.5-VL's vision patch
PUBLISHED_CLIP = {"grpo": (0.2, 0.2), "dr_grpo": (0.2, 0.2), "dapo": (0.2, 0.28), "gspo": (3e-4, 4e-4)}
Fraction = Annotated[float, Field(ge=0, le=1)]
OpenFraction = Annotated[float, Field(ge=0, lt=1)]


class Config(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


def _check_divides(part: str, divisor: int, whole: str, value: int) -> None:
    if value % divisor:
        raise InputError(f"{part} does not divide {whole}", value=value, expected=f"a multiple of {divisor}")


def _check_images_fit(model: ModelConfig, prompt: PromptConfig, buckets: BucketsConfig) -> None:
    images = 2 if prompt.depth_input else 1
    needed = images * 4 * ((model.max_pixels or 0) // (4 * PATCH_PIXELS))
    if needed > buckets.patches[-1]:
        raise InputError(
            f"data.buckets.patches is too small for {images} image(s) of model.max_pixels={model.max_pixels}",
            value=buckets.patches[-1],
            expected=f"at least {needed}",
            fix=f"raise the last bucket to {needed}, or lower model.max_pixels",
        )


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
    attention: Literal["auto", "xla", "splash", "cudnn"] = Field(
        default="auto", description="kernel of self-attention; auto: splash on TPU, cudnn on GPU where it proves right"
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


class RunConfig(RunName):
    resume: Literal["auto", "never", "must"] = Field(
        default="auto", description="auto: continue a run that exists; never: refuse one; must: refuse to start afresh"
    )
    log_every: PositiveInt = Field(default=1, description="steps between lines of metrics.jsonl")
    save_every: PositiveInt = Field(default=100, description="steps between checkpoints")
    keep: PositiveInt = Field(default=3, description="newest checkpoints kept")
    samples_every: PositiveInt | None = Field(
        default=50, description="GRPO: steps between tables of completions with their traces drawn; null: none"
    )
    tensorboard: bool = Field(default=True, description="write TensorBoard event files to the run's directory")
    wandb: bool = Field(default=False, description="also log to Weights & Biases (pip install wandb)")


class TrainConfig(Config):
    """What SFT and GRPO share."""

    run: RunConfig
    model: ModelConfig
    lora: LoraConfig | None = Field(default=None, description="null: full fine-tune")
    freeze_vision: bool = Field(default=True, description="leave the vision tower untouched: no adapters, no updates")
    prompt: PromptConfig = PromptConfig()
    data: DataConfig
    optimizer: OptimizerConfig

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
    def _images_fit(self) -> TrainConfig:
        _check_images_fit(self.model, self.prompt, self.data.buckets)
        return self


class SftConfig(TrainConfig):
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


class RemoteConfig(Config):
    """A model behind an OpenAI-compatible endpoint, and how hard and how far it may be asked."""

    model: str | None = Field(default=None, description="the model's name at the endpoint")
    base_url: str = Field(
        default="https://api.openai.com/v1", description="the endpoint; /chat/completions is asked below it"
    )
    api_key_env: str | None = Field(
        default="OPENAI_API_KEY", description="environment variable that holds the key; null: no key is sent"
    )
    options: dict[str, JsonValue] = Field(
        default={"temperature": 0}, description="further fields of each request, sent as they are"
    )
    concurrency: PositiveInt = Field(default=16, description="requests under way at once")
    timeout_s: PositiveFloat = Field(default=60.0, description="one request, from connecting to its last byte, seconds")
    retries: NonNegativeInt = Field(default=5, description="further attempts of a request that failed")
    backoff_s: PositiveFloat = Field(default=1.0, description="wait before the first retry, seconds; doubles each time")
    max_wait_s: PositiveFloat = Field(
        default=60.0, description="longest wait before a retry, seconds; a server that asks for more is given up"
    )
    cache: str | None = Field(default=None, description="directory of replies, never asked for twice; null: none")
    prompt_price: NonNegativeFloat = Field(default=0.0, description="price of a million prompt tokens")
    completion_price: NonNegativeFloat = Field(default=0.0, description="price of a million completion tokens")
    max_total_tokens: PositiveInt | None = Field(
        default=None, description="stop asking after this many tokens, prompt and completion; null: no cap"
    )
    max_cost: PositiveFloat | None = Field(
        default=None, description="stop asking after this cost, in the prices' currency; null: no cap"
    )

    @field_validator("base_url")
    @classmethod
    def _is_a_url_without_secrets(cls, url: str) -> str:
        try:
            parts = urlsplit(url)
            port = parts.port or 443
        except ValueError:
            raise InputError("not a URL", expected="such as http://localhost:8000/v1") from None
        if parts.username or parts.password or parts.query or parts.fragment:
            raise InputError(
                "a URL that may hold a secret", expected="scheme, host, port and path alone", fix="use api_key_env"
            )
        if parts.scheme not in ("http", "https") or not parts.hostname or not port:
            raise InputError("not a URL", value=url, expected="such as http://localhost:8000/v1")
        return url

    @field_validator("api_key_env")
    @classmethod
    def _is_a_name_not_the_key(cls, name: str | None) -> str | None:
        if name is not None and not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            raise InputError("not the name of an environment variable", expected="a name such as OPENAI_API_KEY")
        return name

    @field_validator("options")
    @classmethod
    def _options_are_free_fields(cls, options: dict[str, JsonValue]) -> dict[str, JsonValue]:
        taken = sorted(options.keys() & {"model", "messages", "stream", "n"})
        if taken:
            raise InputError("not an option", value=taken[0], expected="fields such as temperature, max_tokens, seed")
        return options

    @model_validator(mode="after")
    def _cost_has_prices(self) -> RemoteConfig:
        if self.max_cost is not None and not (self.prompt_price or self.completion_price):
            raise InputError(
                "max_cost without prices is never reached",
                value=self.max_cost,
                expected="prompt_price and completion_price",
                fix="set them, or use max_total_tokens",
            )
        return self


class JudgeConfig(RemoteConfig):
    kind: Literal["rule", "openai"] = Field(
        default="rule", description="rules on the text, or a model behind an OpenAI-compatible endpoint"
    )
    max_failed_share: Fraction = Field(
        default=0.25, description="stop, with the state saved, when more of a rollout's judgements than this fail"
    )

    @model_validator(mode="after")
    def _openai_has_a_model(self) -> JudgeConfig:
        if (self.kind == "openai") != (self.model is not None):
            raise InputError(
                "kind=openai and model belong together",
                value=f"kind={self.kind}, model={self.model}",
                expected="both, or neither",
                fix="set kind=openai and model=NAME",
            )
        return self


class RewardsConfig(Config):
    """The total is the weighted sum of the four terms; 0 leaves a term out."""

    format: NonNegativeFloat = Field(default=1.0, description="weight of the format term")
    answer: NonNegativeFloat = Field(default=1.0, description="weight of the answer term")
    bbox: NonNegativeFloat = Field(default=1.0, description="weight of the box term")
    depth: NonNegativeFloat = Field(default=1.0, description="weight of the depth term")
    answer_progress: bool = Field(default=True, description="pay the gain over the group's previous mean")
    bbox_progress: bool = Field(default=True, description="pay the gain from the first focused area to the last")
    compat: Literal["paper", "release"] = Field(default="paper", description="the paper's formulas, or its code's")
    pair_denominator: Literal["min", "max"] = Field(
        default="min", description="PIoU: mean over min or max of the box counts"
    )
    normalise: Literal["total", "per_term"] = Field(
        default="total", description="advantages from the standardised total, or from the sum of standardised terms"
    )

    @model_validator(mode="after")
    def _something_is_rewarded(self) -> RewardsConfig:
        if not any(self.weights.values()):
            raise InputError("nothing is rewarded", value=self.weights, expected="a weight above 0")
        return self

    @property
    def weights(self) -> dict[str, float]:
        return {"format": self.format, "answer": self.answer, "bbox": self.bbox, "depth": self.depth}


class ObjectiveConfig(Config):
    """What a rollout's advantages are turned into; docs/grpo.md has the formulas and their papers."""

    kind: Literal["grpo", "dr_grpo", "dapo", "gspo"] = Field(
        default="grpo", description="the clipped objective and its mean over tokens"
    )
    clip_low: float | None = Field(
        default=None, gt=0, le=1, description="the ratio is clipped to 1 - clip_low; null: 0.2, gspo 3e-4"
    )
    clip_high: PositiveFloat | None = Field(
        default=None, description="the ratio is clipped to 1 + clip_high; null: 0.2, dapo 0.28, gspo 4e-4"
    )
    kl: Literal["k1", "k2", "k3"] = Field(default="k3", description="estimator of the KL to the reference policy")
    kl_beta: NonNegativeFloat = Field(
        default=0.04, description="weight of the KL; 0: no reference policy is held or computed"
    )

    @property
    def clip(self) -> tuple[float, float]:
        """(low, high), those of the kind's paper where they are not set."""
        low, high = PUBLISHED_CLIP[self.kind]
        return self.clip_low or low, self.clip_high or high


class GrpoConfig(TrainConfig):
    prompts_per_step: PositiveInt = Field(default=2, description="prompts per rollout, over the whole job")
    micro_batch: PositiveInt = Field(default=1, description="prompts per forward pass; divides prompts_per_step")
    num_samples: int = Field(default=8, ge=2, description="completions per prompt (the group's size N)")
    max_new_tokens: PositiveInt = Field(default=2048, description="longest completion, tokens")
    temperature: PositiveFloat = Field(default=1.0, description="sampling temperature")
    top_p: float = Field(
        default=1.0, gt=0, le=1, description="sample from the smallest set with this probability; 1: off"
    )
    top_k: NonNegativeInt = Field(default=0, description="sample from the k likeliest tokens; 0: off")
    epochs: PositiveInt = Field(default=20, description="visits to every prompt")
    max_steps: PositiveInt | None = Field(default=None, description="rollouts, whatever epochs says; null: from epochs")
    updates_per_rollout: PositiveInt = Field(default=1, description="optimizer steps on one rollout")
    objective: ObjectiveConfig = ObjectiveConfig()
    rewards: RewardsConfig = RewardsConfig()
    judge: JudgeConfig = JudgeConfig()
    advantage_eps: PositiveFloat = Field(default=1e-4, description="added to the group's standard deviation")

    @model_validator(mode="after")
    def _micro_batches_are_whole(self) -> GrpoConfig:
        if self.prompts_per_step % self.micro_batch:
            raise InputError(
                "micro_batch does not divide prompts_per_step",
                value=self.micro_batch,
                expected=f"a divisor of {self.prompts_per_step}",
                fix="change micro_batch or prompts_per_step",
            )
        return self


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

    @model_validator(mode="after")
    def _images_fit(self) -> EvalConfig:
        _check_images_fit(self.model, self.prompt, self.data.buckets)
        return self


class SamplingConfig(Config):
    max_new_tokens: PositiveInt = Field(default=2048, description="longest completion, tokens")
    num_samples: PositiveInt = Field(default=1, description="completions")
    temperature: NonNegativeFloat = Field(default=0.0, description="sampling temperature; 0: greedy")
    seed: NonNegativeInt = Field(default=0, description="seed of the sampler")


class GenerateConfig(Config):
    model: ModelConfig
    prompt: PromptConfig = PromptConfig()
    image: str = Field(description="image file")
    depth: str | None = Field(
        default=None, description="depth image file (near = 0); needed when prompt.depth_input is true"
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
                fix="give depth=FILE, or prompt.depth_input=false",
            )
        return self


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


class ScenesBuildConfig(Config):
    out: str = Field(description="directory to write: SPLIT.json and the images")
    splits: dict[str, PositiveInt] = Field(description="scenes per split, such as {train: 400, test: 50}")
    seed: NonNegativeInt = Field(default=0, description="the same seed builds the same files")
    workers: PositiveInt = Field(default=1, description="processes that render")
    questions_per_scene: PositiveInt = Field(default=1, description="rows per scene, each of another family")
    families: tuple[str, ...] | None = Field(default=None, description="question families; null: all")
    distractor_rate: Fraction = Field(default=0.5, description="share of rows that first look at a wrong place")


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


class VariantConfig(Config):
    """KEY=VALUE words that go after those of the grid; null: this variant has no such stage."""

    all: tuple[str, ...] = Field(default=(), description="for each of its stages, such as prompt.depth_input=false")
    sft: tuple[str, ...] | None = Field(default=(), description="for its fine-tuning, such as target=answer")
    grpo: tuple[str, ...] | None = Field(default=(), description="for its reinforcement, such as rewards.bbox=0")
    eval: tuple[str, ...] = Field(default=(), description="for its evaluation, such as target=answer")


Words = Annotated[tuple[str, ...], Field(min_length=1)]


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
