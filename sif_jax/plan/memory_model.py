"""Device memory of one training step as formulas (pure). docs/gpu.md says them in words, docs/plan.md how far off they are.

Letters as in the code: L tokens of a row, D width, F ffn width, N heads, K key heads, H head_dim, V patches. `e` is the size of
an activation in bytes. The coefficients of activations were fitted to programs that XLA compiled for CPU.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from sif_jax.config import GrpoConfig, SftConfig, TrainConfig
from sif_jax.errors import InputError
from sif_jax.models.qwen2_5_vl.config import Qwen2_5_VLConfig
from sif_jax.ops.attention_backends import LOGITS_BYTES as ATTENTION_BYTES
from sif_jax.ops.attention_backends import causal_parts
from sif_jax.ops.loss import chunk_rows
from sif_jax.plan.model_size import ModelSize

FLOAT32 = 4
BACKWARD_F, BACKWARD_D = 9, 14  # values per token in the backward pass of one layer: the feed-forward's, the rest
FORWARD_F, FORWARD_D = 3, 8
KEPT_F, KEPT_D = 7, 8  # values per token and layer that remat=none keeps
LOGITS_COPIES = 2.5  # logits, weights and their gradient, not all alive at once
CACHE_GROWTH = 1.5  # the cache doubles: the old half is alive while the new one is filled


class Shape(NamedTuple):
    """What one device computes at a time, before the last two divide it."""

    prompts: int  # rows of tokens; in GRPO the prompts
    length: int
    samples: int  # completions of each prompt; 0 in SFT
    new_tokens: int
    patches: int  # per row
    fused: bool = False  # a kernel that holds no logits attends within a row
    sequence: int = 1  # devices that share the tokens of a row
    tensor: int = 1  # devices that share heads, ffn and vocabulary

    @property
    def heads_shared(self) -> int:
        return self.sequence * self.tensor


class Phase(NamedTuple):
    name: str
    parts: dict[str, float]  # bytes

    @property
    def total(self) -> float:
        return sum(self.parts.values())


def held(size: ModelSize, config: TrainConfig, fsdp: int, tensor: int = 1) -> dict[str, float]:
    """What stays for the whole run, on each device: weights, adapters, gradients, AdamW's two float32 moments.

    Accumulation needs the sum so far beside the new gradients. A full fine-tune with a KL keeps a copy of its start.
    """
    accumulated = isinstance(config, SftConfig) and config.accumulation > 1
    accumulated |= isinstance(config, GrpoConfig) and config.prompts_per_step > config.micro_batch
    reference = isinstance(config, GrpoConfig) and config.lora is None and config.objective.kl_beta > 0
    parts = {
        "frozen weights": size.frozen_bytes,
        "trained weights": size.trainable_bytes,
        "gradients": size.trainable_bytes * (2 if accumulated else 1),
        "optimizer": 2 * FLOAT32 * size.trainable,
        "reference": size.trainable_bytes if reference else 0,
    }
    split = {name: amount / (fsdp * tensor) for name, amount in parts.items()}
    return split | {"weights in use": in_use(size, fsdp) / tensor}


def in_use(size: ModelSize, fsdp: int) -> float:
    """The loop over layers cuts each out of the stack; of split weights the next one is fetched meanwhile, and the head."""
    return float(size.layer_bytes if fsdp == 1 else 2 * size.layer_bytes + size.head_bytes)


def optimizer_phase(size: ModelSize, fsdp: int) -> Phase:
    """Updates are float32 whatever is trained."""
    return Phase("optimizer step", {"updates": FLOAT32 * size.trainable / fsdp})


def sft_phases(
    config: SftConfig,
    model: Qwen2_5_VLConfig,
    devices: int,
    *,
    fused: bool = False,
    sequence: int = 1,
    tensor: int = 1,
) -> list[Phase]:
    """The largest bucket decides. `devices` share out the rows, `sequence` x `tensor` more what one row needs."""
    if config.batch_size % devices:
        fix = "change batch_size"
        raise InputError("rows do not divide over the devices", value=config.batch_size, expected=str(devices), fix=fix)
    length, patches = config.data.buckets.pairs[-1]
    shape = Shape(config.batch_size // devices, length, 0, 0, patches, fused, sequence, tensor)
    return [Phase("gradient step", _backward(config, model, shape))]


def grpo_phases(
    config: GrpoConfig,
    model: Qwen2_5_VLConfig,
    devices: int,
    fsdp: int,
    *,
    fused: bool = False,
    sequence: int = 1,
    tensor: int = 1,
    separate: bool = True,
) -> list[Phase]:
    """As `parallel.mesh.shard_groups` splits: prompts over the devices, else the samples of every prompt.

    `fsdp` divides the decoder's second copy, which `separate` layers need.
    """
    length, patches = config.data.buckets.pairs[-1]
    prompts, samples = config.prompts_per_step, config.num_samples
    if prompts % devices == 0:
        prompts, learning = prompts // devices, max(config.micro_batch // devices, 1)
    elif samples % devices == 0:
        samples, learning = samples // devices, config.micro_batch
    else:
        value = f"prompts_per_step={prompts}, num_samples={samples}"
        raise InputError("neither prompts nor samples divide over the devices", value=value, expected=str(devices))
    rollout = Shape(prompts, length, samples, config.max_new_tokens, patches, fused, sequence, tensor)
    learn = rollout._replace(prompts=learning)
    apart = _layers_apart(config, model) / fsdp if separate else 0.0
    return [
        Phase("rollout", _rollout(config, model, rollout) | {"layers apart": apart}),
        Phase("gradient step", _backward(config, model, learn)),
    ]


def kv_bytes(model: Qwen2_5_VLConfig, tokens: int, e: int) -> float:
    """2 · layers · K · H · e per token: keys and values."""
    text = model.text
    return 2.0 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim * e * tokens


def _rollout(config: GrpoConfig, model: Qwen2_5_VLConfig, shape: Shape) -> dict[str, float]:
    e, text = _itemsize(config), model.text
    tokens = shape.prompts * shape.length
    width = FORWARD_F * text.intermediate_size / shape.tensor + FORWARD_D * text.hidden_size
    prefill = e * tokens / shape.sequence * width
    generated = shape.prompts * shape.samples
    return {
        "KV of prompts": kv_bytes(model, tokens, e) / shape.tensor,
        "KV of samples": CACHE_GROWTH * kv_bytes(model, generated * shape.new_tokens, e) / shape.tensor,
        "logits": 2 * FLOAT32 * generated * text.vocab_size / shape.tensor,
        "working": max(prefill + _causal_attention(text.num_attention_heads, shape), _vision_forward(model, shape, e)),
        "batch": _batch(model, shape),
    }


def _layers_apart(config: GrpoConfig, model: Qwen2_5_VLConfig) -> float:
    """The decoder's weights once more (`separate_layers`), biases and norms left out; not where they are apart all the time."""
    if config.separate_layers is False or not config.model.scan_layers:
        return 0.0
    text = model.text
    attention = 2 * text.hidden_size * (text.num_attention_heads + text.num_key_value_heads) * text.head_dim
    layer = attention + 3 * text.hidden_size * text.intermediate_size
    return float(_itemsize(config) * text.num_hidden_layers * layer)


def _backward(config: TrainConfig, model: Qwen2_5_VLConfig, shape: Shape) -> dict[str, float]:
    e, text = _itemsize(config), model.text
    tokens = shape.prompts * (shape.length + shape.samples * shape.new_tokens) / shape.sequence
    attention = _causal_attention(text.num_attention_heads, shape) + _group_attention(text.num_attention_heads, shape)
    layer = _layer_backward(tokens, text.intermediate_size / shape.tensor, text.hidden_size, attention, e)
    vision_kept, vision_layer = _vision_backward(config, model, shape, e)
    whole = attention if shape.samples or _fits_at_once(text.num_attention_heads, shape) else 0.0
    kept = _kept(config, model, tokens, shape.tensor, whole, e)
    return {
        "kept for backward": kept + vision_kept,
        "one layer's backward": max(layer if config.model.remat != "none" else 0.0, vision_layer),
        "logits": _loss(tokens, text.vocab_size, shape.tensor),
        "batch": _batch(model, shape),
    }


def _kept(
    config: TrainConfig, model: Qwen2_5_VLConfig, tokens: float, tensor: int, whole_attention: float, e: int
) -> float:
    """What `model.remat` keeps of every layer: its input; and what its linear layers put out but the last; or everything."""
    text = model.text
    D, F = text.hidden_size, text.intermediate_size
    qkv = (text.num_attention_heads + 2 * text.num_key_value_heads) * text.head_dim
    products = (qkv + 2 * F) / tensor + D
    values = {"full": D, "dots": D + products, "none": KEPT_F * F / tensor + KEPT_D * D}[config.model.remat]
    attention = LOGITS_COPIES * whole_attention if config.model.remat == "none" else 0.0
    return text.num_hidden_layers * (tokens * values * e + attention)


def _layer_backward(tokens: float, ffn: float, width: int, attention: float, e: int) -> float:
    """The feed-forward's part comes first, while attention's weights wait; then attention's own."""
    feed_forward = tokens * (BACKWARD_F * ffn + BACKWARD_D * width) * e + attention
    return max(feed_forward, tokens * BACKWARD_D * width * e + LOGITS_COPIES * attention)


def _self_attention(heads: int, shape: Shape) -> float:
    """Float32 logits of the prompts' rows that XLA holds at once; a fused kernel holds none."""
    parts = math.ceil(FLOAT32 * heads * shape.length**2 / ATTENTION_BYTES)
    own = max(heads / shape.heads_shared, 1)
    return 0.0 if shape.fused else shape.prompts * FLOAT32 * own * shape.length * math.ceil(shape.length / parts)


def _causal_attention(heads: int, shape: Shape) -> float:
    """A row that is not chunked leaves out the keys that a part of its queries cannot see."""
    parts = causal_parts(shape.length) if _fits_at_once(heads, shape) else 1
    return _self_attention(heads, shape) * (parts + 1) / (2 * parts)


def _fits_at_once(heads: int, shape: Shape) -> bool:
    return FLOAT32 * heads * shape.length**2 <= ATTENTION_BYTES


def _group_attention(heads: int, shape: Shape) -> float:
    """Float32 logits of the completions over their prompt and themselves, [N, T, S + T] each, never in parts; a fused kernel
    holds none."""
    keys, own = shape.length + shape.new_tokens, heads / shape.heads_shared
    return 0.0 if shape.fused else FLOAT32 * own * shape.prompts * shape.samples * shape.new_tokens * keys


def _vision_forward(model: Qwen2_5_VLConfig, shape: Shape, e: int) -> float:
    vision, patches = model.vision, shape.prompts * shape.patches / shape.sequence
    values = FORWARD_F * vision.intermediate_size / shape.tensor + FORWARD_D * vision.hidden_size
    return patches * values * e + _self_attention(vision.num_heads, shape._replace(length=max(shape.patches, 1)))


def _vision_backward(config: TrainConfig, model: Qwen2_5_VLConfig, shape: Shape, e: int) -> tuple[float, float]:
    """(kept, one block's backward); a frozen tower keeps nothing, and in GRPO its features are computed in the rollout."""
    vision, patches = model.vision, shape.prompts * shape.patches / shape.sequence
    if config.freeze_vision:
        return 0.0, 0.0 if shape.samples else _vision_forward(model, shape, e)
    attention = _self_attention(vision.num_heads, shape._replace(length=max(shape.patches, 1)))
    block = _layer_backward(patches, vision.intermediate_size / shape.tensor, vision.hidden_size, attention, e)
    return vision.depth * patches * vision.hidden_size * e, block


def _loss(tokens: float, vocab: int, tensor: int) -> float:
    return LOGITS_COPIES * FLOAT32 * chunk_rows(math.ceil(tokens), vocab) * vocab / tensor


def _batch(model: Qwen2_5_VLConfig, shape: Shape) -> float:
    """Float32 patches; the other arrays are small beside them."""
    return float(FLOAT32 * shape.prompts * shape.patches * model.vision.patch_dim)


def _itemsize(config: TrainConfig) -> int:
    return {"float32": 4, "bfloat16": 2}[config.model.dtype]
