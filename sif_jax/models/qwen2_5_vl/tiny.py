"""A small random Qwen2.5-VL checkpoint in Hugging Face layout, for the demo and the tests (io)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from flax import nnx
from tokenizers import Tokenizer

from sif_jax.config import TinyModelConfig
from sif_jax.models.qwen2_5_vl.config import Qwen2_5_VLConfig
from sif_jax.models.qwen2_5_vl.image_processor import ImageProcessor
from sif_jax.models.qwen2_5_vl.model import Qwen2_5_VL
from sif_jax.models.qwen2_5_vl.tiny_tokenizer import write_tokenizer
from sif_jax.models.qwen2_5_vl.weights import save_weights


def write_tiny_checkpoint(directory: str | Path, config: TinyModelConfig, tokenizer: Tokenizer, *, seed: int) -> None:
    """config.json, safetensors, tokenizer and preprocessor_config.json, as a published checkpoint has them."""
    directory = Path(directory)
    write_tokenizer(tokenizer, directory)
    raw = config_json(config, tokenizer)
    (directory / "config.json").write_text(json.dumps(raw, indent=2) + "\n")
    ImageProcessor(min_pixels=28 * 28, max_pixels=config.max_pixels).save(directory)
    model = Qwen2_5_VL(Qwen2_5_VLConfig.from_dict(raw), param_dtype=jnp.float32, rngs=nnx.Rngs(params=seed))
    save_weights(model, directory)


def config_json(config: TinyModelConfig, tokenizer: Tokenizer) -> dict[str, Any]:
    """The keys of a published Qwen2.5-VL config.json."""
    pairs = config.hidden_size // config.num_attention_heads // 2
    sides = (pairs - pairs // 4) // 2
    ids = {
        name: tokenizer.token_to_id(f"<|{name}|>") for name in ("image_pad", "video_pad", "vision_start", "vision_end")
    }
    return {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "model_type": "qwen2_5_vl",
        "torch_dtype": "float32",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "hidden_act": "silu",
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-06,
        "rope_theta": 10000.0,
        "rope_scaling": {"type": "mrope", "mrope_section": [pairs - 2 * sides, sides, sides]},
        "tie_word_embeddings": True,
        "use_sliding_window": False,
        "bos_token_id": tokenizer.token_to_id("<|endoftext|>"),
        "eos_token_id": tokenizer.token_to_id("<|im_end|>"),
        "pad_token_id": tokenizer.token_to_id("<|endoftext|>"),
        "image_token_id": ids["image_pad"],
        "video_token_id": ids["video_pad"],
        "vision_start_token_id": ids["vision_start"],
        "vision_end_token_id": ids["vision_end"],
        "vision_config": {
            "model_type": "qwen2_5_vl",
            "depth": config.vision.depth,
            "hidden_size": config.vision.hidden_size,
            "intermediate_size": config.vision.intermediate_size,
            "num_heads": config.vision.num_heads,
            "out_hidden_size": config.hidden_size,
            "fullatt_block_indexes": list(config.vision.fullatt_block_indexes),
            "window_size": config.vision.window_size,
            "patch_size": 14,
            "spatial_patch_size": 14,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "in_channels": 3,
            "hidden_act": "silu",
            "tokens_per_second": 2,
        },
    }
