"""GRPO-SIF: the judge, the rewards, the objective and the loop (host)."""

from __future__ import annotations

import re
from typing import Literal
from urllib.parse import urlsplit

from pydantic import (
    Field,
    JsonValue,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    field_validator,
    model_validator,
)

from sif_jax.config.inputs import TruncationConfig
from sif_jax.config.section import Config, Fraction
from sif_jax.config.training import TrainConfig
from sif_jax.errors import InputError

PUBLISHED_CLIP = {"grpo": (0.2, 0.2), "dr_grpo": (0.2, 0.2), "dapo": (0.2, 0.28), "gspo": (3e-4, 4e-4)}


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


class GrpoConfig(TruncationConfig, TrainConfig):
    RANKS = (
        *(f"reward/{term}" for term in ("total", "format", "answer", "bbox", "depth")),
        "judge",
        "hiou_last",
        "loss",
        "grad_norm",
        "entropy",
        "completion_length",
        "truncated",
        "groups_without_signal",
    )

    prompts_per_step: PositiveInt = Field(default=2, description="prompts per rollout, over the whole job")
    micro_batch: PositiveInt = Field(default=1, description="prompts per forward pass; divides prompts_per_step")
    num_samples: int = Field(default=8, ge=2, description="completions per prompt (the group's size N)")
    max_new_tokens: PositiveInt = Field(default=2048, description="longest completion, tokens")
    temperature: PositiveFloat = Field(default=1.0, description="sampling temperature")
    stop: tuple[str, ...] = Field(default=(), description="strings that end a completion, such as </answer>")
    decode_rows: PositiveInt | None = Field(
        default=None, description="completions decoded at once, over the whole job; null: all of a step"
    )
    separate_layers: bool | None = Field(
        default=None,
        description="decode from a second copy of the decoder's weights, which XLA need not copy at every step; "
        "null: on CPU and GPU",
    )
    remove_padding: bool = Field(
        default=True,
        description="the learner's linear layers leave the completions' padding out; lanes of up to eight sizes are compiled",
    )
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
