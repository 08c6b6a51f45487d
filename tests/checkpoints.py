"""Tiny random checkpoints, written by transformers, that every parity test shares."""

from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import torch
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from sif_jax.models.qwen2_5_vl.image_processor import ImageProcessor
from sif_jax.models.qwen2_5_vl.tiny_tokenizer import train_tokenizer, write_tokenizer

CORPUS = ["Where is the red cube? It is left of the blue ball.", '<area>[{"bbox_2d":[0.100,0.200]}]</area>'] * 4


@cache
def tiny_checkpoint(*, tied: bool = False, rope: str = "rope_parameters") -> Path:
    """A random float32 Qwen2.5-VL with two full-attention blocks, windows of 4 x 4 patches and grouped queries."""
    directory = Path(mkdtemp(prefix="sif-jax-tiny-"))
    tokenizer = train_tokenizer(CORPUS, vocab_size=300)
    write_tokenizer(tokenizer, directory)
    ids = {
        name: tokenizer.token_to_id(f"<|{name}|>") for name in ("image_pad", "video_pad", "vision_start", "vision_end")
    }
    torch.manual_seed(0)
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": 320,
            "hidden_size": 48,
            "intermediate_size": 80,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "rms_norm_eps": 1e-6,
            "initializer_range": 0.2,
            "bos_token_id": tokenizer.token_to_id("<|endoftext|>"),
            "eos_token_id": tokenizer.token_to_id("<|im_end|>"),
            "pad_token_id": tokenizer.token_to_id("<|endoftext|>"),
            rope: {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 2, 2]},
        },
        vision_config={
            "depth": 4,
            "hidden_size": 32,
            "intermediate_size": 56,
            "num_heads": 2,
            "out_hidden_size": 48,
            "fullatt_block_indexes": [1, 3],
            "window_size": 56,
            "initializer_range": 0.2,
        },
        image_token_id=ids["image_pad"],
        video_token_id=ids["video_pad"],
        vision_start_token_id=ids["vision_start"],
        vision_end_token_id=ids["vision_end"],
        tie_word_embeddings=tied,
    )
    model = Qwen2_5_VLForConditionalGeneration(config)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if name.endswith("bias") or "norm" in name or "ln_q" in name:
                value.add_(0.1 * torch.randn_like(value))  # ones and zeros would hide a missing term
    model.save_pretrained(directory)
    ImageProcessor(min_pixels=28 * 28, max_pixels=28 * 28 * 24).save(directory)
    return directory


@cache
def torch_model(directory: Path) -> Qwen2_5_VLForConditionalGeneration:
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(directory, dtype=torch.float32)
    return model.eval()
