"""The operations that a LoRA step cannot do without, whatever an engine computes on top of them (pure).

Two per multiplication and addition of every matrix product. A frozen weight has a forward product and one backward, to its
input; a low-rank factor has a third, its own gradient; attention has two forward and four backward and is counted whole, not
its causal half, as in PaLM's model FLOPs (arXiv:2204.02311, appendix B). What is recomputed is not counted, nor the head at
tokens that are no targets, nor the completion's padding, nor a prompt more than once per group.
"""

from __future__ import annotations

from collections.abc import Iterable

from sif_jax.bench.train_workload import TrainWork
from sif_jax.models.qwen2_5_vl.config import Qwen2_5_VLConfig, TextConfig


def step_flops(config: Qwen2_5_VLConfig, work: TrainWork, *, rank: int) -> int:
    """Of an SFT step, or of a GRPO update: image features, the reference's log-probabilities, and the gradient."""
    lengths = [int(length) for length in (work.batch["segments"] > 0).sum(-1)]
    spans = [(length, length) for length in lengths]
    predicted = int((work.batch["loss_mask"][:, 1:] > 0).sum())
    if work.completed is not None:
        completions = work.completed.mask.sum(-1)
        spans += [(int(new), length + int(new)) for length, own in zip(lengths, completions) for new in own]
        predicted = int(completions.sum())
    frozen = _frozen(config.text, spans) + 2 * predicted * config.text.hidden_size * config.text.vocab_size
    attention, adapters = _attention(config.text, spans), _adapters(config.text, spans, rank)
    forward = frozen + attention if work.completed is not None else 0  # the reference's, which has no adapters
    return vision_flops(config, work) + forward + 2 * frozen + 3 * attention + 3 * adapters


def _shapes(text: TextConfig) -> list[tuple[int, int]]:
    """(d_in, d_out) of a layer's linear maps."""
    width, heads = text.hidden_size, text.num_attention_heads * text.head_dim
    keys = text.num_key_value_heads * text.head_dim
    wide = text.intermediate_size
    return [(width, heads), (width, keys), (width, keys), (heads, width), (width, wide), (width, wide), (wide, width)]


def _frozen(text: TextConfig, spans: Iterable[tuple[int, int]]) -> int:
    tokens = sum(queries for queries, _ in spans)
    return 2 * tokens * text.num_hidden_layers * sum(d_in * d_out for d_in, d_out in _shapes(text))


def _adapters(text: TextConfig, spans: Iterable[tuple[int, int]], rank: int) -> int:
    tokens = sum(queries for queries, _ in spans)
    return 2 * tokens * text.num_hidden_layers * rank * sum(d_in + d_out for d_in, d_out in _shapes(text))


def _attention(text: TextConfig, spans: Iterable[tuple[int, int]]) -> int:
    heads = text.num_attention_heads * text.head_dim
    return 4 * text.num_hidden_layers * heads * sum(queries * keys for queries, keys in spans)


def vision_flops(config: Qwen2_5_VLConfig, work: TrainWork) -> int:
    """The frozen tower's forward pass."""
    vision, segments = config.vision, work.batch["patch_segments"]
    patches = int((segments > 0).sum())
    width, wide, merge = vision.hidden_size, vision.intermediate_size, vision.merge_unit
    images = [int((row == number).sum()) for row in segments for number in range(1, row.max() + 1)]
    linear = 2 * patches * vision.depth * (4 * width**2 + 3 * width * wide)
    whole = len(vision.fullatt_block_indexes)
    seen = (
        whole * sum(n * n for n in images)
        + (vision.depth - whole) * patches * (vision.window_size // vision.patch_size) ** 2
    )
    merged = merge * width
    ends = 2 * patches * vision.patch_dim * width + 2 * patches // merge * merged * (merged + vision.out_hidden_size)
    return linear + 4 * width * seen + ends
