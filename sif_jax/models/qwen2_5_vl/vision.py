"""The vision tower of Qwen2.5-VL: patches to merged image features (pure).

Most blocks attend inside windows of at most 64 patches, the blocks named by `fullatt_block_indexes` over the whole image.
Everything that depends on an image's size (positions, segments, windows) arrives as arrays made on the host.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, Shaped

from sif_jax.models.qwen2_5_vl.config import VisionConfig
from sif_jax.models.qwen2_5_vl.layers import Key, Linear, RMSNorm, SwiGLU, layer_keys, stack
from sif_jax.ops.attention import attention, head_major, segment_mask
from sif_jax.ops.attention_backends import Backend, self_attention
from sif_jax.ops.rotary import Rope, axial_rope, rotate
from sif_jax.ops.scan import Remat, scan_layers
from sif_jax.ops.windows import permute
from sif_jax.parallel.partition import constrain

PATCHES = ("batch", "patches", None)


class VisionBlock(nnx.Module):
    def __init__(self, config: VisionConfig, *, dtype: DTypeLike, attention: Backend, rngs: nnx.Rngs):
        dim = config.hidden_size
        self.norm1 = RMSNorm(dim, eps=1e-6, dtype=dtype)
        self.qkv = Linear(dim, 3 * dim, bias=True, name="qkv", dtype=dtype, rngs=rngs)
        self.proj = Linear(dim, dim, bias=True, name="proj", dtype=dtype, rngs=rngs)
        self.norm2 = RMSNorm(dim, eps=1e-6, dtype=dtype)
        self.mlp = SwiGLU(dim, config.intermediate_size, bias=True, dtype=dtype, rngs=rngs)
        self.num_heads = config.num_heads
        self.attention: Backend = attention

    def __call__(
        self,
        hidden: Shaped[Array, "B V D"],
        rope: Rope,
        whole: Bool[Array, ""],
        segments: Int[Array, "B V"],
        windows: Int[Array, "B W S"],
        window_segments: Int[Array, "B W S"],
        slots: Int[Array, "B V"],
        key: Key,
    ) -> Shaped[Array, "B V D"]:
        qkv = self.qkv(self.norm1(hidden), key)
        q, k, v = jnp.moveaxis(qkv.reshape(*hidden.shape[:2], 3, self.num_heads, -1), 2, 0)
        qkv = jnp.stack([rotate(q, rope), rotate(k, rope), v], axis=2)
        context = jax.lax.cond(
            whole,
            lambda qkv: full_attention(qkv, segments, self.attention),
            lambda qkv: window_attention(qkv, windows, window_segments, slots),
            qkv,
        )
        hidden = constrain(hidden + self.proj(context.reshape(hidden.shape), key), *PATCHES)
        return constrain(hidden + self.mlp(self.norm2(hidden), key), *PATCHES)


def full_attention(
    qkv: Shaped[Array, "B V 3 N H"], segments: Int[Array, "B V"], backend: Backend
) -> Shaped[Array, "B V N H"]:
    """Attention of every patch to its own image."""
    q, k, v = jnp.moveaxis(qkv, 2, 0)
    return self_attention(q, head_major(k), head_major(v), segments, causal=False, backend=backend)


def window_attention(
    qkv: Shaped[Array, "B V 3 N H"],
    windows: Int[Array, "B W S"],
    segments: Int[Array, "B W S"],
    slots: Int[Array, "B V"],
) -> Shaped[Array, "B V N H"]:
    """Attention inside each window, as one dense batch; small windows share S slots and see their own segment."""
    batch, count, size = windows.shape
    source = windows.reshape(batch, -1)
    q, k, v = jnp.moveaxis(permute(qkv, source, slots).reshape(batch * count, size, *qkv.shape[2:]), 2, 0)
    context = attention(q, head_major(k), head_major(v), segment_mask(segments.reshape(-1, size)))
    return permute(context.reshape(batch, -1, *context.shape[2:]), slots, source)


class PatchMerger(nnx.Module):
    """Four neighbouring patches become one feature of the decoder's width."""

    def __init__(self, config: VisionConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        width = config.hidden_size * config.merge_unit
        self.norm = RMSNorm(config.hidden_size, eps=1e-6, dtype=dtype)
        self.fc1 = Linear(width, width, bias=True, name="merger.0", dtype=dtype, rngs=rngs)
        self.fc2 = Linear(width, config.out_hidden_size, bias=True, name="merger.2", dtype=dtype, rngs=rngs)
        self.width = width

    def __call__(self, hidden: Shaped[Array, "B V C"], key: Key = None) -> Shaped[Array, "B M D"]:
        merged = constrain(self.norm(hidden).reshape(hidden.shape[0], -1, self.width), *PATCHES)
        return self.fc2(jax.nn.gelu(self.fc1(merged, key), approximate=False), key)


class VisionTower(nnx.Module):
    def __init__(self, config: VisionConfig, *, dtype: DTypeLike, attention: Backend, rngs: nnx.Rngs):
        self.patch_embed = Linear(
            config.patch_dim, config.hidden_size, bias=False, name="patch_embed", dtype=dtype, rngs=rngs
        )
        self.blocks = stack(
            lambda rngs: VisionBlock(config, dtype=dtype, attention=attention, rngs=rngs), config.depth, rngs
        )
        self.merger = PatchMerger(config, dtype=dtype, rngs=rngs)
        self.config = config

    def __call__(
        self,
        patches: Float[Array, "B V patch"],
        positions: Int[Array, "B V 2"],
        segments: Int[Array, "B V"],
        windows: Int[Array, "B W S"],
        window_segments: Int[Array, "B W S"],
        window_slot: Int[Array, "B V"],
        *,
        dtype: DTypeLike,
        remat: Remat = "none",
        key: Key = None,
    ) -> Shaped[Array, "B M D"]:
        """Features of the merged patches, M = V / 4, in the order of the patches."""
        config = self.config
        rope = axial_rope(positions, head_dim=config.head_dim, theta=config.rope_theta)
        slots = jnp.where(segments > 0, window_slot, -1)
        whole = np.isin(np.arange(config.depth), config.fullatt_block_indexes)
        graphdef, blocks = nnx.split(self.blocks)

        def block(hidden, layer):
            state, whole, key = layer
            return nnx.merge(graphdef, state)(hidden, rope, whole, segments, windows, window_segments, slots, key), None

        hidden = self.patch_embed(patches.astype(dtype))
        layers = (blocks, jnp.asarray(whole), layer_keys(key, config.depth))
        hidden, _ = scan_layers(block, hidden, layers, remat=remat)
        return self.merger(hidden, key)
