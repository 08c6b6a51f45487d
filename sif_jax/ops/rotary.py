"""Rotary position embeddings of Qwen2.5-VL: multimodal (t, h, w) in the decoder, axial (h, w) in the tower (pure)."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Shaped

Rope = tuple[Float[Array, "*batch H"], Float[Array, "*batch H"]]


def mrope(positions: Int[Array, "*batch 3"], *, sections: tuple[int, ...], theta: float) -> Rope:
    """Cosines and sines in which frequency band i turns with the axis (t, h, w) of its section (arXiv:2409.12191)."""
    half = sum(sections)
    frequencies = theta ** (-np.arange(half, dtype=np.float32) / half)
    axis = np.repeat(np.arange(len(sections)) % 3, sections)
    angles = positions.astype(jnp.float32)[..., axis] * _bands(frequencies, positions.ndim)
    return _cos_sin(angles)


def axial_rope(positions: Int[Array, "*batch 2"], *, head_dim: int, theta: float) -> Rope:
    """Half of the bands turn with the patch's row, half with its column."""
    quarter = head_dim // 4
    frequencies = theta ** (-np.arange(quarter, dtype=np.float32) / quarter)
    axis = np.repeat([0, 1], quarter)
    angles = positions.astype(jnp.float32)[..., axis] * _bands(np.tile(frequencies, 2), positions.ndim)
    return _cos_sin(angles)


def _bands(frequencies: np.ndarray, ndim: int) -> Array:
    return jnp.asarray(frequencies, jnp.float32).reshape((1,) * (ndim - 1) + (-1,))


def _cos_sin(angles: Float[Array, "*batch half"]) -> Rope:
    angles = jnp.concatenate([angles, angles], axis=-1)
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: Shaped[Array, "*batch N H"], rope: Rope) -> Shaped[Array, "*batch N H"]:
    """Turn each pair (x_i, x_{i + H/2}) by its angle, in float32."""
    cos, sin = (part[..., None, :] for part in rope)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([-second, first], axis=-1)
    return (x * cos + turned * sin).astype(x.dtype)
