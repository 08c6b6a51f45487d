"""The text decoder of Qwen2.5-VL, and the four ways it is run (pure).

    forward        one pass over packed rows                      (SFT, scoring)
    prefill        the same, and each layer's keys and values     (rollout)
    group_forward  a prompt and its M completions in one pass      (GRPO: the prompt is computed once per group)
    decode_step    one new token for every sample, with a cache    (rollout)

All four share `DecoderLayer.qkv` and `DecoderLayer.finish` and differ only in what a query may see.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Int, Shaped

from sif_jax.models.qwen2_5_vl.config import TextConfig
from sif_jax.models.qwen2_5_vl.layers import Key, Linear, RMSNorm, SwiGLU, layer_keys, stack
from sif_jax.ops.attention import head_major, prefix_attention
from sif_jax.ops.attention_backends import Backend, self_attention
from sif_jax.ops.rotary import Rope, mrope, rotate
from sif_jax.ops.scan import Remat, scan_layers
from sif_jax.parallel.partition import constrain


class Prefix(NamedTuple):
    """Keys and values of the prompts, held once per prompt."""

    k: Shaped[Array, "layer P K S H"]
    v: Shaped[Array, "layer P K S H"]
    mask: Bool[Array, "P S"]


class Cache(NamedTuple):
    """Keys and values of each sample's own tokens."""

    k: Shaped[Array, "layer P M K U H"]
    v: Shaped[Array, "layer P M K U H"]

    @property
    def length(self) -> int:
        return self.k.shape[4]

    def grow(self, length: int) -> Cache:
        """The same cache with room for `length` tokens."""
        room = [(0, 0)] * 4 + [(0, length - self.length), (0, 0)]
        return Cache(jnp.pad(self.k, room), jnp.pad(self.v, room))


class DecoderLayer(nnx.Module):
    def __init__(self, config: TextConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        dim, head = config.hidden_size, config.head_dim
        kv = config.num_key_value_heads * head

        def linear(name: str, d_in: int, d_out: int, bias: bool) -> Linear:
            return Linear(d_in, d_out, bias=bias, name=name, dtype=dtype, rngs=rngs)

        self.input_layernorm = RMSNorm(dim, eps=config.rms_norm_eps, dtype=dtype)
        self.q_proj = linear("q_proj", dim, config.num_attention_heads * head, True)
        self.k_proj = linear("k_proj", dim, kv, True)
        self.v_proj = linear("v_proj", dim, kv, True)
        self.o_proj = linear("o_proj", config.num_attention_heads * head, dim, False)
        self.post_attention_layernorm = RMSNorm(dim, eps=config.rms_norm_eps, dtype=dtype)
        self.mlp = SwiGLU(dim, config.intermediate_size, bias=False, dtype=dtype, rngs=rngs)
        self.head_dim = head

    def qkv(self, hidden: Shaped[Array, "*batch D"], rope: Rope, key: Key = None) -> tuple[Array, Array, Array]:
        """Queries [..., T, N, H]; keys and values head-major, [..., K, T, H]."""
        x = self.input_layernorm(hidden)
        q, k, v = (
            proj(x, key).reshape(*x.shape[:-1], -1, self.head_dim) for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        return rotate(q, rope), head_major(rotate(k, rope)), head_major(v)

    def finish(
        self, hidden: Shaped[Array, "*batch D"], context: Shaped[Array, "*batch N H"], key: Key = None
    ) -> Shaped[Array, "*batch D"]:
        hidden = along_rows(hidden + self.o_proj(context.reshape(*hidden.shape[:-1], -1), key))
        return along_rows(hidden + self.mlp(self.post_attention_layernorm(hidden), key))


def along_rows(hidden: Shaped[Array, "*batch D"]) -> Shaped[Array, "*batch D"]:
    """Split by rows, and a [B, T, D] by tokens too, with the width whole: then weights are gathered and not activations."""
    inner = ("tokens",) if hidden.ndim == 3 else ("...",) * (hidden.ndim - 2)
    return constrain(hidden, "batch", *inner, None)


class Decoder(nnx.Module):
    def __init__(self, config: TextConfig, *, dtype: DTypeLike, attention: Backend, rngs: nnx.Rngs):
        self.layers = stack(lambda rngs: DecoderLayer(config, dtype=dtype, rngs=rngs), config.num_hidden_layers, rngs)
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps, dtype=dtype)
        self.config = config
        self.attention: Backend = attention

    def rope(self, positions: Int[Array, "*batch 3"]) -> Rope:
        return mrope(positions, sections=self.config.mrope_section, theta=self.config.rope_theta)

    def causal_attention(
        self,
        q: Shaped[Array, "B T N H"],
        k: Shaped[Array, "B K T H"],
        v: Shaped[Array, "B K T H"],
        segments: Int[Array, "B T"],
    ) -> Shaped[Array, "B T N H"]:
        return self_attention(q, k, v, segments, causal=True, backend=self.attention)

    def forward(
        self,
        hidden: Shaped[Array, "B T D"],
        positions: Int[Array, "B T 3"],
        segments: Int[Array, "B T"],
        *,
        remat: Remat = "none",
        key: Key = None,
    ) -> Shaped[Array, "B T D"]:
        rope = self.rope(positions)
        graphdef, layers = nnx.split(self.layers)

        def body(hidden, layer):
            state, key = layer
            block = nnx.merge(graphdef, state)
            q, k, v = block.qkv(hidden, rope, key)
            return block.finish(hidden, self.causal_attention(q, k, v, segments), key), None

        keys = layer_keys(key, self.config.num_hidden_layers)
        hidden, _ = scan_layers(body, hidden, (layers, keys), remat=remat)
        return self.norm(hidden)

    def prefill(
        self, hidden: Shaped[Array, "P S D"], positions: Int[Array, "P S 3"], segments: Int[Array, "P S"]
    ) -> tuple[Shaped[Array, "P S D"], Prefix]:
        rope = self.rope(positions)
        graphdef, layers = nnx.split(self.layers)

        def body(hidden, state):
            block = nnx.merge(graphdef, state)
            q, k, v = block.qkv(hidden, rope)
            return block.finish(hidden, self.causal_attention(q, k, v, segments)), (k, v)

        hidden, (k, v) = scan_layers(body, hidden, layers)
        return self.norm(hidden), Prefix(k, v, segments > 0)

    def group_forward(
        self,
        prompt: Shaped[Array, "P S D"],
        prompt_positions: Int[Array, "P S 3"],
        prompt_segments: Int[Array, "P S"],
        completion: Shaped[Array, "P M T D"],
        completion_positions: Int[Array, "P M T 3"],
        *,
        remat: Remat = "none",
        key: Key = None,
    ) -> tuple[Shaped[Array, "P S D"], Shaped[Array, "P M T D"]]:
        """Final hidden states of the prompts and of the completions that continue them."""
        prompt_rope, rope = self.rope(prompt_positions), self.rope(completion_positions)
        visible, length = prompt_segments > 0, completion.shape[2]
        causal = jnp.tril(jnp.ones((length, length), bool))
        graphdef, layers = nnx.split(self.layers)

        def body(hidden, layer):
            (prompt, completion), (state, key) = hidden, layer
            block = nnx.merge(graphdef, state)
            q, prefix_k, prefix_v = block.qkv(prompt, prompt_rope, key)
            context = self.causal_attention(q, prefix_k, prefix_v, prompt_segments)
            prompt = block.finish(prompt, context, key)
            q, k, v = block.qkv(completion, rope, key)
            context = prefix_attention(q, prefix_k, prefix_v, visible, k, v, causal)
            return (prompt, block.finish(completion, context, key)), None

        keys = layer_keys(key, self.config.num_hidden_layers)
        (prompt, completion), _ = scan_layers(body, (prompt, completion), (layers, keys), remat=remat)
        return self.norm(prompt), self.norm(completion)

    def decode_step(
        self,
        hidden: Shaped[Array, "P M D"],
        positions: Int[Array, "P M 3"],
        prefix: Prefix,
        cache: Cache,
        index: Int[Array, ""],
    ) -> tuple[Shaped[Array, "P M D"], Cache]:
        """Write token number `index` of every sample into the cache and return its final hidden state."""
        rope = self.rope(positions[:, :, None])
        mask = (jnp.arange(cache.length) <= index)[None]
        graphdef, layers = nnx.split(self.layers)

        def body(carry, layer):
            hidden, cache_k, cache_v = carry
            state, prefix_k, prefix_v, number = layer
            block = nnx.merge(graphdef, state)
            q, k, v = block.qkv(hidden, rope)
            start = (number, 0, 0, 0, index, 0)
            cache_k = jax.lax.dynamic_update_slice(cache_k, k[None].astype(cache_k.dtype), start)
            cache_v = jax.lax.dynamic_update_slice(cache_v, v[None].astype(cache_v.dtype), start)
            own_k, own_v = (jax.lax.dynamic_index_in_dim(c, number, keepdims=False) for c in (cache_k, cache_v))
            context = prefix_attention(q, prefix_k, prefix_v, prefix.mask, own_k, own_v, mask)
            return (block.finish(hidden, context), cache_k, cache_v), None

        numbers = jnp.arange(self.config.num_hidden_layers)
        carry = (hidden[:, :, None], cache.k, cache.v)
        (hidden, k, v), _ = scan_layers(body, carry, (layers, prefix.k, prefix.v, numbers))
        return self.norm(hidden)[:, :, 0], Cache(k, v)

    def empty_cache(self, prompts: int, samples: int, dtype: DTypeLike) -> Cache:
        config = self.config
        shape = (config.num_hidden_layers, prompts, samples, config.num_key_value_heads, 0, config.head_dim)
        return Cache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))
