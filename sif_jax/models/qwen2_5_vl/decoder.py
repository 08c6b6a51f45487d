"""The text decoder of Qwen2.5-VL, and the four ways it is run (pure).

    forward        one pass over packed rows                      (SFT, scoring)
    prefill        the same, and each layer's keys and values     (rollout)
    group_forward  a prompt and its M completions in one pass      (GRPO: the prompt is computed once per group)
    decode_step    one new token for every row, with a cache       (rollout)

All four share `DecoderLayer.qkv` and `DecoderLayer.finish` and differ only in what a query may see.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Int, Shaped

from sif_jax.models.qwen2_5_vl.config import TextConfig
from sif_jax.models.qwen2_5_vl.layers import Key, Linear, RMSNorm, SwiGLU, fold_in, layer_keys, stack
from sif_jax.ops.attention import head_major, row_attention
from sif_jax.ops.attention_backends import Backend, self_attention
from sif_jax.ops.group_attention import group_attention
from sif_jax.ops.packing import Packing
from sif_jax.ops.rotary import Rope, mrope, rotate
from sif_jax.ops.scan import Remat, scan_layers
from sif_jax.parallel.partition import constrain

Stack = Shaped[Array, "layer *rest"] | tuple[Shaped[Array, "*rest"], ...]


class Prefix(NamedTuple):
    """Keys and values of G prompts, held once per prompt."""

    k: Stack  # of [G, K, S, H]
    v: Stack
    mask: Bool[Array, "G S"]


class Cache(NamedTuple):
    """Keys and values of the R rows' own tokens: a ring of U columns, in which all rows write the same column at a time.

    Rotary positions are in the keys, so attention does not mind in which column a token lies.
    """

    k: Stack  # of [R, K, U, H]
    v: Stack


class RowPlaces(NamedTuple):
    """Which rows belong to which prompt, and which columns of the ring each row may read; see `row_attention`."""

    members: Int[Array, "lane g M"]
    place: Int[Array, "lane r"]
    column: Int[Array, ""]  # to write
    visible: Bool[Array, "R U"]  # that column included


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
    def __init__(
        self, config: TextConfig, *, dtype: DTypeLike, attention: Backend, scan_layers: bool = True, rngs: nnx.Rngs
    ):
        self.layers = stack(lambda rngs: DecoderLayer(config, dtype=dtype, rngs=rngs), config.num_hidden_layers, rngs)
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps, dtype=dtype)
        self.config = config
        self.attention: Backend = attention
        self.scan_layers = scan_layers

    def rope(self, positions: Int[Array, "*batch 3"]) -> Rope:
        return mrope(positions, sections=self.config.mrope_section, theta=self.config.rope_theta)

    def causal_attention(
        self,
        q: Shaped[Array, "B T N H"],
        k: Shaped[Array, "B K T H"],
        v: Shaped[Array, "B K T H"],
        segments: Int[Array, "B T"],
        *,
        packed: bool = False,
    ) -> Shaped[Array, "B T N H"]:
        return self_attention(q, k, v, segments, causal=True, backend=self.attention, packed=packed)

    def forward(
        self,
        hidden: Shaped[Array, "B T D"],
        positions: Int[Array, "B T 3"],
        segments: Int[Array, "B T"],
        *,
        remat: Remat = "none",
        key: Key = None,
        packed: bool = True,
    ) -> Shaped[Array, "B T D"]:
        rope = self.rope(positions)
        graphdef, layers = nnx.split(self.layers)

        def body(hidden, layer):
            state, key = layer
            block = nnx.merge(graphdef, state)
            q, k, v = block.qkv(hidden, rope, key)
            return block.finish(hidden, self.causal_attention(q, k, v, segments, packed=packed), key), None

        keys = layer_keys(key, self.config.num_hidden_layers)
        hidden, _ = scan_layers(body, hidden, (layers, keys), remat=remat, scan=self.scan_layers)
        return self.norm(hidden)

    def prefill(
        self, hidden: Shaped[Array, "P S D"], positions: Int[Array, "P S 3"], segments: Int[Array, "P S"]
    ) -> tuple[Shaped[Array, "P S D"], Shaped[Array, "layer P K S H"], Shaped[Array, "layer P K S H"]]:
        """Final hidden states of the prompts, and each layer's keys and values."""
        rope = self.rope(positions)
        graphdef, layers = nnx.split(self.layers)

        def body(hidden, state):
            block = nnx.merge(graphdef, state)
            q, k, v = block.qkv(hidden, rope)
            return block.finish(hidden, self.causal_attention(q, k, v, segments)), (k, v)

        hidden, (k, v) = scan_layers(body, hidden, layers, scan=self.scan_layers)
        return self.norm(hidden), k, v

    def group_forward(
        self,
        prompt: Shaped[Array, "P S D"],
        prompt_positions: Int[Array, "P S 3"],
        prompt_segments: Int[Array, "P S"],
        completion: Shaped[Array, "P M T D"],
        completion_positions: Int[Array, "P M T 3"],
        *,
        packing: Packing | None = None,
        remat: Remat = "none",
        key: Key = None,
    ) -> tuple[Shaped[Array, "P S D"], Shaped[Array, "P M T D"]]:
        """Final hidden states of the prompts and of the completions that continue them.

        With `packing` all but attention leaves the completions' padding out. Dropout draws by token, so packing does not
        change it.
        """
        prompts, samples, length, _ = completion.shape
        shape = prompts, samples, length
        numbers = jnp.arange(math.prod(shape)).reshape(shape)
        if packing is not None:
            completion, completion_positions, numbers = map(packing.packed, (completion, completion_positions, numbers))
        prompt_rope, rope = self.rope(prompt_positions), self.rope(completion_positions)
        graphdef, layers = nnx.split(self.layers)

        def attend(q: Array, k: Array, v: Array, prefix_k: Array, prefix_v: Array) -> Array:
            if packing is not None:
                q, *own = (packing.padded(x, shape, "attention", None) for x in (q, head_major(k), head_major(v)))
                k, v = map(head_major, own)
            context = group_attention(q, prefix_k, prefix_v, prompt_segments > 0, k, v, backend=self.attention)
            return context if packing is None else packing.packed(context, "attention", None)

        def body(hidden, layer):
            (prompt, completion), (state, key) = hidden, layer
            block = nnx.merge(graphdef, state)
            q, prefix_k, prefix_v = block.qkv(prompt, prompt_rope, key)
            context = self.causal_attention(q, prefix_k, prefix_v, prompt_segments)
            prompt = block.finish(prompt, context, key)
            key = None if key is None else fold_in(jax.random.fold_in(key, 1), numbers)  # for other inputs, other noise
            context = attend(*block.qkv(completion, rope, key), prefix_k, prefix_v)
            return (prompt, block.finish(completion, context, key)), None

        keys = layer_keys(key, self.config.num_hidden_layers)
        (prompt, completion), _ = scan_layers(
            body, (prompt, completion), (layers, keys), remat=remat, scan=self.scan_layers
        )
        completion = self.norm(completion)
        return self.norm(prompt), completion if packing is None else packing.padded(completion, shape)

    def decode_step(
        self,
        hidden: Shaped[Array, "R D"],
        positions: Int[Array, "R"],
        prefix: Prefix,
        cache: Cache,
        places: RowPlaces,
        layers: Sequence[nnx.State] | None = None,
    ) -> tuple[Shaped[Array, "R D"], Cache]:
        """Write one token of every row into the cache and return its final hidden state.

        With `layers`, the weights of each layer as arrays of their own (`layer_arrays`), prefix and cache are tuples, and
        the layers are written out; without, all of them are stacked, and the layers are a loop.
        """
        rope = self.rope(jnp.broadcast_to(positions[:, None, None], (len(positions), 1, 3)))
        graphdef, stacked = nnx.split(self.layers)

        def layer(hidden, state, prefix_k, prefix_v, cache, number):
            block = nnx.merge(graphdef, state)
            q, k, v = block.qkv(hidden, rope)
            cache, own_k, own_v = _write(cache, k, v, places.column, number)
            context = row_attention(
                q[:, 0], prefix_k, prefix_v, prefix.mask, own_k, own_v, places.visible, places.members, places.place
            )
            return block.finish(hidden, context[:, None]), cache

        hidden = hidden[:, None]
        if layers is None:
            numbers = jnp.arange(self.config.num_hidden_layers)
            (hidden, cache), _ = jax.lax.scan(
                lambda carry, each: (layer(carry[0], *each[:3], carry[1], each[3]), None),
                (hidden, cache),
                (stacked, prefix.k, prefix.v, numbers),
            )
        else:
            caches = []
            for state, prefix_k, prefix_v, k, v in zip(layers, prefix.k, prefix.v, cache.k, cache.v, strict=True):
                hidden, written = layer(hidden, state, prefix_k, prefix_v, Cache(k, v), None)
                caches.append(written)
            cache = Cache(tuple(each.k for each in caches), tuple(each.v for each in caches))
        return self.norm(hidden)[:, 0], cache


def _write(cache: Cache, k: Array, v: Array, column: Array, number: Array | None) -> tuple[Cache, Array, Array]:
    """The cache with one more column, and its keys and values of this layer; `number` is the layer's place in a stack."""

    def one(held: Any, new: Array) -> tuple[Array, Array]:
        new, at = new.astype(held.dtype), (0, 0, column, 0)
        if number is None:
            held = jax.lax.dynamic_update_slice(held, new, at)
            return held, held
        held = jax.lax.dynamic_update_slice(held, new[None], (number, *at))
        return held, jax.lax.dynamic_index_in_dim(held, number, keepdims=False)

    (held_k, own_k), (held_v, own_v) = one(cache.k, k), one(cache.v, v)
    return Cache(held_k, held_v), own_k, own_v
