"""The layers that the vision tower and the decoder share: linear with an optional LoRA, RMSNorm, SwiGLU (pure)."""

from __future__ import annotations

import zlib
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Shaped

from sif_jax.ops.scan import LINEAR, LOW_RANK
from sif_jax.parallel.partition import constrain

Key = Array | None  # one for all tokens, or one each


class LoRAParam(nnx.Param):
    """A low-rank factor, always float32."""


class Linear(nnx.Module):
    """y = x W + b, and + (alpha / R) dropout(x) A B once `add_lora` has given it factors (arXiv:2106.09685)."""

    def __init__(self, d_in: int, d_out: int, *, bias: bool, name: str, dtype: DTypeLike, rngs: nnx.Rngs):
        initial = nnx.initializers.lecun_normal()(rngs.params(), (d_in, d_out), dtype)
        self.kernel = nnx.Param(initial)
        self.bias = nnx.Param(jnp.zeros(d_out, dtype)) if bias else None
        self.lora_a: LoRAParam | None = nnx.data(None)
        self.lora_b: LoRAParam | None = nnx.data(None)
        self.lora_alpha = 0.0
        self.lora_dropout = 0.0
        self.salt = zlib.crc32(name.encode())

    def __call__(self, x: Shaped[Array, "*batch d_in"], key: Key = None) -> Shaped[Array, "*batch d_out"]:
        y = jnp.matmul(x, self.kernel[...].astype(x.dtype))
        if self.bias is not None:
            y = y + _aligned(self.bias[...], y)
        if self.lora_a is None or self.lora_b is None:
            return checkpoint_name(y, LINEAR)
        if key is not None and self.lora_dropout > 0:
            x = _dropout(x, fold_in(key, self.salt), self.lora_dropout)
        # Split where they are kept and whole where they are used: they are small, and no activation takes on their split.
        a, b = (constrain(factor[...].astype(x.dtype), None, None) for factor in (self.lora_a, self.lora_b))
        low = checkpoint_name(jnp.matmul(x, a), LOW_RANK)
        return checkpoint_name(y + _up_project(self.lora_alpha / low.shape[-1] * low, b), LINEAR)


@jax.custom_vjp
def _up_project(low: Shaped[Array, "*batch R"], b: Shaped[Array, "R d_out"]) -> Shaped[Array, "*batch d_out"]:
    """low b, from the rank to the width. Left to JAX, b's gradient is a product that XLA reads the wide cotangent transposed
    for: on CPU a copy of it, a third of a training step."""
    return jnp.matmul(low, b)


def _up_project_backward(kept: tuple[Array, Array], cotangent: Array) -> tuple[Array, Array]:
    low, b = kept
    rows, wide = low.reshape(-1, low.shape[-1]), cotangent.reshape(-1, cotangent.shape[-1])
    return jnp.einsum("...d,rd->...r", cotangent, b), jnp.einsum("mr,md->rd", rows, wide)


_up_project.defvjp(lambda low, b: (_up_project(low, b), (low, b)), _up_project_backward)


def _aligned(vector: Shaped[Array, "D"], x: Shaped[Array, "*batch D"]) -> Shaped[Array, "*ones D"]:
    """Split where it is kept and whole where it is used, as factors are: with a bias split over tensor and fsdp, and rows over
    data and fsdp, one a device, XLA (jax 0.10.2, CPU) computed wrong image features."""
    return constrain(vector, None).astype(x.dtype).reshape((1,) * (x.ndim - 1) + vector.shape)


def _dropout(x: Array, key: Array, rate: float) -> Array:
    """Behind a barrier: XLA would draw the mask again in each of its users, and the paper's GRPO gradients compile in 103 s for
    16 TPU chips instead of 181."""
    own = key.reshape(-1)  # one key draws for all of x, and one each for its own token
    draws = jax.vmap(partial(jax.random.bernoulli, p=1.0 - rate, shape=x.shape[key.ndim :]))(own)
    keep = jax.lax.optimization_barrier(draws.reshape(x.shape))
    return jnp.where(keep, x / (1.0 - rate), 0.0).astype(x.dtype)


def fold_in(key: Array, data: int | Int[Array, "*batch"]) -> Array:
    """A key of each key, or of each number: then a token's noise does not depend on where it stands."""
    shape = jnp.broadcast_shapes(key.shape, jnp.shape(data))
    if not shape:
        return jax.random.fold_in(key, data)
    pairs = jnp.broadcast_to(key, shape), jnp.broadcast_to(jnp.asarray(data, jnp.uint32), shape)
    return jax.vmap(jax.random.fold_in)(*(x.reshape(-1) for x in pairs)).reshape(shape)


class RMSNorm(nnx.Module):
    def __init__(self, dim: int, *, eps: float, dtype: DTypeLike):
        self.scale = nnx.Param(jnp.ones(dim, dtype))
        self.eps = eps

    def __call__(self, x: Shaped[Array, "*batch D"]) -> Shaped[Array, "*batch D"]:
        wide = x.astype(jnp.float32)
        normed = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.eps)
        return _aligned(self.scale[...], x) * normed.astype(x.dtype)


class SwiGLU(nnx.Module):
    def __init__(self, dim: int, hidden: int, *, bias: bool, dtype: DTypeLike, rngs: nnx.Rngs):
        self.gate_proj = Linear(dim, hidden, bias=bias, name="gate_proj", dtype=dtype, rngs=rngs)
        self.up_proj = Linear(dim, hidden, bias=bias, name="up_proj", dtype=dtype, rngs=rngs)
        self.down_proj = Linear(hidden, dim, bias=bias, name="down_proj", dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "*batch D"], key: Key = None) -> Float[Array, "*batch D"]:
        return self.down_proj(jax.nn.silu(self.gate_proj(x, key)) * self.up_proj(x, key), key)


def stack(make, count: int, rngs: nnx.Rngs):
    """`count` copies of a module, each with its own random weights, as one module with a leading layer axis."""

    @nnx.split_rngs(splits=count)
    @nnx.vmap(in_axes=0, out_axes=0, transform_metadata={nnx.PARTITION_NAME: None})
    def build(rngs: nnx.Rngs):
        return make(rngs)

    return build(rngs)


def layer_keys(key: Key, count: int) -> Array | None:
    return None if key is None else jax.random.split(key, count)
