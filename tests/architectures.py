"""Architectures known by their numbers alone, for tests that compile and never run."""

from sif_jax.models.qwen2_5_vl.config import Qwen2_5_VLConfig, TextConfig, VisionConfig


def tiny_architecture(*, vocab_size: int = 512, layers: int = 2, vision_depth: int = 2) -> Qwen2_5_VLConfig:
    text = TextConfig(
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        rms_norm_eps=1e-6,
        rope_theta=10000.0,
        mrope_section=(4, 2, 2),
        tie_word_embeddings=False,
    )
    vision = VisionConfig(
        depth=vision_depth,
        hidden_size=32,
        intermediate_size=48,
        num_heads=2,
        out_hidden_size=32,
        fullatt_block_indexes=(vision_depth - 1,),
        window_size=56,
    )
    special = vocab_size - 4
    return Qwen2_5_VLConfig(text, vision, special, special + 1, special + 2, special + 3)
