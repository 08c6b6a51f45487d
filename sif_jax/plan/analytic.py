"""A plan by formulas alone: memory and time of a step on a mesh, in milliseconds instead of minutes (pure).

Memory by `memory_model.py`. Time is the largest of computing, reading memory and sending, each at the data sheet's rate; it
serves to order meshes, and docs/plan.md says how far both are from compiled programs.
"""

from __future__ import annotations

from math import prod
from typing import NamedTuple

from sif_jax.config import GrpoConfig, SftConfig, TrainConfig
from sif_jax.errors import InputError
from sif_jax.models.qwen2_5_vl.config import Qwen2_5_VLConfig
from sif_jax.plan.memory_model import Phase, grpo_phases, held, optimizer_phase, sft_phases
from sif_jax.plan.model_size import ModelSize
from sif_jax.plan.roofline import Times
from sif_jax.plan.setting import Setting

PASSES = {"full": 3, "dots": 2, "none": 2}  # over the activations: forward, recomputed, backward
GATHERS = 2  # of split weights: forward, and once for what is recomputed and its gradient
WIDE, FFN = 24, 12  # values per token and layer that a pass reads or writes: of the width, of the feed-forward
NOT_OVERLAPPED = 0.1  # of the shorter times


class Estimate(NamedTuple):
    held: dict[str, float]
    phases: list[Phase]

    @property
    def needed(self) -> float:
        """Bytes per device."""
        return sum(self.held.values()) + max(phase.total for phase in self.phases)


def estimate(setting: Setting, size: ModelSize) -> Estimate:
    """
    Raises:
      InputError: the batch does not divide over the mesh.
    """
    config, mesh = setting.config, setting.mesh
    shards, tensor = mesh["data"] * mesh["fsdp"], mesh["tensor"]
    inner = {"fused": config.model.attention != "xla", "sequence": mesh["sequence"], "tensor": tensor}
    if isinstance(config, SftConfig):
        phases = sft_phases(config, setting.architecture, shards, **inner)
    else:
        assert isinstance(config, GrpoConfig)
        separate = setting.topology.platform != "tpu"
        phases = grpo_phases(config, setting.architecture, shards, mesh["fsdp"] * tensor, **inner, separate=separate)
    phases.append(optimizer_phase(size, mesh["fsdp"] * tensor))
    return Estimate(held(size, config, mesh["fsdp"], tensor), phases)


def estimated_seconds(setting: Setting, size: ModelSize) -> float:
    """Of one optimizer step; what does not bound a program counts a little, as not all of it overlaps."""
    config = setting.config
    if isinstance(config, SftConfig):
        tokens = config.batch_size * config.data.buckets.pairs[-1][0]
        return config.accumulation * _blurred(learning_times(setting, size, tokens))
    assert isinstance(config, GrpoConfig)
    prompt = config.data.buckets.pairs[-1][0]
    tokens = config.micro_batch * (prompt + config.num_samples * config.max_new_tokens)
    parts = config.prompts_per_step // config.micro_batch
    learning = parts * config.updates_per_rollout * _blurred(learning_times(setting, size, tokens))
    return learning + config.max_new_tokens * _blurred(decoding_times(setting, size))


def _blurred(times: Times) -> float:
    return times.bound + NOT_OVERLAPPED * (sum(times) - times.bound)


def learning_times(setting: Setting, size: ModelSize, tokens: int) -> Times:
    """Of one micro-step on so many tokens of all devices."""
    config, text, mesh = setting.config, setting.architecture.text, setting.mesh
    devices, chip, e = prod(mesh.values()), setting.topology.chip, itemsize(config)
    passes, layers, own = PASSES[config.model.remat], text.num_hidden_layers, tokens * mesh["tensor"] / devices
    products = 2 * size.layer_bytes / e * layers + 2 * text.hidden_size * text.vocab_size
    flops = (passes + (config.lora is None)) * products * tokens / devices
    values = WIDE * text.hidden_size + FFN * text.intermediate_size / mesh["tensor"]
    weights = float(layers * size.layer_bytes + size.head_bytes)
    memory = passes * own * layers * values * e + 2 * GATHERS * weights / mesh["tensor"]
    return Times(
        flops / chip.flops,
        memory / chip.hbm_bandwidth,
        sent_bytes(setting, weights, own, passes) / chip.link_bandwidth,
    )


def sent_bytes(setting: Setting, weights: float, own_tokens: float, passes: int) -> float:
    """Per device: weights that are gathered, activations that are summed over `tensor`, rows that `sequence` puts together."""
    text, mesh, e = setting.architecture.text, setting.mesh, itemsize(setting.config)
    layers, width = text.num_hidden_layers, text.hidden_size
    gathered = GATHERS * weights / mesh["tensor"] * share(mesh["fsdp"])
    summed = passes * layers * 2 * 2 * own_tokens * width * e * share(mesh["tensor"])
    heads = 2 * (text.num_attention_heads + text.num_key_value_heads) * text.head_dim
    swapped = passes * layers * own_tokens * heads / mesh["tensor"] * e * share(mesh["sequence"])
    return gathered + summed + swapped


def decoding_times(setting: Setting, size: ModelSize) -> Times:
    """Of one token of every row: the weights are read, and gathered where they are split; keys and values are read."""
    config, text, mesh = setting.config, setting.architecture.text, setting.mesh
    assert isinstance(config, GrpoConfig)
    chip, e = setting.topology.chip, itemsize(config)
    weights = (text.num_hidden_layers * size.layer_bytes + size.head_bytes) / mesh["tensor"]
    rows = config.prompts_per_step * config.num_samples / (mesh["data"] * mesh["fsdp"])
    cached = 2 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim * e * rows * config.max_new_tokens
    return Times(
        2 * weights / e * rows / chip.flops,
        (weights + cached / mesh["tensor"]) / chip.hbm_bandwidth,
        weights * share(mesh["fsdp"]) / chip.link_bandwidth,
    )


def share(devices: int) -> float:
    return (devices - 1) / devices


def itemsize(config: TrainConfig) -> int:
    return {"float32": 4, "bfloat16": 2}[config.model.dtype]


def fits(setting: Setting, size: ModelSize, *, scale: float = 1.0) -> bool:
    """By the formulas, corrected by `scale`: what a compiled plan said, over what they said of it."""
    try:
        return scale * estimate(setting, size).needed <= setting.topology.chip.hbm_bytes
    except InputError:  # a batch that does not divide over such a mesh
        return False


def tensor_sizes(architecture: Qwen2_5_VLConfig) -> list[int]:
    """Over how many devices heads can be split."""
    text, vision = architecture.text, architecture.vision
    counts = (text.num_attention_heads, text.num_key_value_heads, vision.num_heads)
    return [size for size in range(1, min(counts) + 1) if not any(count % size for count in counts)]
