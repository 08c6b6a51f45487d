"""The architecture of a Qwen2.5-VL checkpoint, read from its config.json (host)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import DTypeLike

from sif_jax.errors import InputError

DTYPE_KEYS = ("torch_dtype", "dtype")  # the second since transformers 4.56
SECTIONS = ("text_config", "vision_config")


MAX_POSITIONS = 32768  # of a config.json that does not say, as in transformers
# What a config.json may leave out of vision_config: the published 32B does.
VISION_DEFAULTS = {
    "depth": 32,
    "num_heads": 16,
    "fullatt_block_indexes": (7, 15, 23, 31),
    "window_size": 112,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
}


@dataclass(frozen=True)
class VisionConfig:
    depth: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    out_hidden_size: int
    fullatt_block_indexes: tuple[int, ...]
    window_size: int = 112
    patch_size: int = 14
    spatial_merge_size: int = 2
    temporal_patch_size: int = 2
    in_channels: int = 3
    rope_theta: float = 10000.0

    @property
    def patch_dim(self) -> int:
        return self.in_channels * self.temporal_patch_size * self.patch_size**2

    @property
    def merge_unit(self) -> int:
        return self.spatial_merge_size**2

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads


@dataclass(frozen=True)
class TextConfig:
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    rms_norm_eps: float
    rope_theta: float
    mrope_section: tuple[int, ...]
    tie_word_embeddings: bool
    max_positions: int = MAX_POSITIONS  # longest sequence that the model was made for, tokens

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads


@dataclass(frozen=True)
class Qwen2_5_VLConfig:  # noqa: N801  the model's published name
    text: TextConfig
    vision: VisionConfig
    image_token_id: int
    vision_start_token_id: int
    vision_end_token_id: int
    video_token_id: int

    @classmethod
    def from_directory(cls, directory: str | Path) -> Qwen2_5_VLConfig:
        """Read `config.json`.

        Raises:
          InputError: the file is missing, malformed, of another architecture, or asks for something not supported.
        """
        raw, path = _read_json(directory)
        return cls.from_dict(raw, file=path)

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], *, file: str | Path = "config.json") -> Qwen2_5_VLConfig:
        """Both published layouts: text keys flat at the top (hub) or under `text_config` (transformers 5)."""
        if raw.get("model_type") != "qwen2_5_vl":
            raise InputError("another architecture", file=file, value=raw.get("model_type"), expected="'qwen2_5_vl'")
        text = {**raw, **(raw.get("text_config") or {})}
        try:
            config = cls(
                text=_text_config(text, tied=_is_tied(raw), file=file),
                vision=_vision_config(VISION_DEFAULTS | raw["vision_config"]),
                image_token_id=raw["image_token_id"],
                vision_start_token_id=raw["vision_start_token_id"],
                vision_end_token_id=raw["vision_end_token_id"],
                video_token_id=raw["video_token_id"],
            )
        except KeyError as error:
            raise InputError("a key is missing", file=file, value=error.args[0]) from None
        _check(config, text, file)
        return config


def _read_json(directory: str | Path) -> tuple[dict[str, Any], Path]:
    path = Path(directory) / "config.json"
    try:
        return json.loads(path.read_text()), path
    except FileNotFoundError:
        raise InputError(
            "no model here", file=path, expected="a Hugging Face checkpoint directory", fix="check model.path"
        ) from None
    except json.JSONDecodeError as error:
        raise InputError(f"malformed JSON at line {error.lineno}: {error.msg}", file=path) from None


def stored_dtype(directory: str | Path) -> Literal["float32", "bfloat16"]:
    """The dtype that a checkpoint's config.json names; float32, which holds them all, for any but bfloat16."""
    raw, _ = _read_json(directory)
    return "bfloat16" if "bfloat16" in (raw.get(key) for key in DTYPE_KEYS) else "float32"


def write_dtype(directory: Path, dtype: DTypeLike) -> None:
    """Name another dtype in a config.json, wherever it names one."""
    raw, path = _read_json(directory)
    for section in (raw, *(raw[name] for name in SECTIONS if name in raw)):
        section.update({key: np.dtype(dtype).name for key in DTYPE_KEYS if section.get(key)})
    path.write_text(json.dumps(raw, indent=2) + "\n")


def _is_tied(raw: Mapping[str, Any]) -> bool:
    return bool(raw.get("tie_word_embeddings") or (raw.get("text_config") or {}).get("tie_word_embeddings"))


def _text_config(text: Mapping[str, Any], *, tied: bool, file: str | Path) -> TextConfig:
    rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind not in ("default", "mrope"):
        raise InputError("this rotary scaling is not supported", file=file, value=kind, expected="'default' or 'mrope'")
    return TextConfig(
        vocab_size=text["vocab_size"],
        hidden_size=text["hidden_size"],
        intermediate_size=text["intermediate_size"],
        num_hidden_layers=text["num_hidden_layers"],
        num_attention_heads=text["num_attention_heads"],
        num_key_value_heads=text["num_key_value_heads"],
        rms_norm_eps=text["rms_norm_eps"],
        rope_theta=float(rope["rope_theta"] if "rope_theta" in rope else text["rope_theta"]),
        mrope_section=tuple(rope["mrope_section"]),
        tie_word_embeddings=tied,
        max_positions=text.get("max_position_embeddings", MAX_POSITIONS),
    )


def _vision_config(vision: Mapping[str, Any]) -> VisionConfig:
    return VisionConfig(
        depth=vision["depth"],
        hidden_size=vision["hidden_size"],
        intermediate_size=vision["intermediate_size"],
        num_heads=vision["num_heads"],
        out_hidden_size=vision["out_hidden_size"],
        fullatt_block_indexes=tuple(vision["fullatt_block_indexes"]),
        window_size=vision["window_size"],
        patch_size=vision["patch_size"],
        spatial_merge_size=vision["spatial_merge_size"],
        temporal_patch_size=vision["temporal_patch_size"],
        in_channels=vision.get("in_channels") or vision.get("in_chans") or 3,
        rope_theta=float((vision.get("rope_parameters") or {}).get("rope_theta") or 10000.0),
    )


def _check(config: Qwen2_5_VLConfig, text: Mapping[str, Any], file: str | Path) -> None:
    """Refuse what the port would compute wrongly."""
    if text.get("use_sliding_window"):
        raise InputError("sliding-window text attention is not supported", file=file, value=True, expected="false")
    if text.get("hidden_act", "silu") != "silu":
        raise InputError("unknown activation", file=file, value=text["hidden_act"], expected="'silu'")
    if 2 * sum(config.text.mrope_section) != config.text.head_dim:
        raise InputError(
            "mrope_section does not fill half the head",
            file=file,
            value=config.text.mrope_section,
            expected=f"a sum of {config.text.head_dim // 2}",
        )
    if config.vision.out_hidden_size != config.text.hidden_size:
        raise InputError(
            "the vision tower does not feed the decoder",
            file=file,
            value=config.vision.out_hidden_size,
            expected=f"vision_config.out_hidden_size {config.text.hidden_size}",
        )
