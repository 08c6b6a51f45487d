"""AdamW with clipping, a learning-rate schedule and float32 moments (pure)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from optax import tree as optax_tree

from sif_jax.config import OptimizerConfig

Schedule = Callable[[jax.typing.ArrayLike], jax.typing.ArrayLike]
UNDECAYED = {"bias", "scale"}


def make_optimizer(config: OptimizerConfig, total_steps: int) -> optax.GradientTransformation:
    """Clip by global norm, Adam, decoupled weight decay, schedule. The updates are float32."""
    return _in_float32(
        optax.chain(
            optax.identity() if config.max_grad_norm is None else optax.clip_by_global_norm(config.max_grad_norm),
            optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.eps),
            optax.add_decayed_weights(config.weight_decay, mask=decay_mask),
            optax.scale_by_learning_rate(learning_rate(config, total_steps)),
        )
    )


def learning_rate(config: OptimizerConfig, total_steps: int) -> Schedule:
    """The rate of optimizer step 0, 1, …: linear from 0 in the warm-up, then the decay, which ends at `total_steps`.

    The steps are those of transformers' `get_scheduler`, so step 0 of a warm-up changes nothing.
    """
    peak, last = config.learning_rate, config.min_lr_ratio * config.learning_rate
    warmup = math.ceil(config.warmup_ratio * total_steps)
    steps = max(total_steps - warmup, 1)
    match config.schedule:
        case "constant":
            decay = optax.constant_schedule(peak)
        case "linear":
            decay = optax.linear_schedule(peak, last, steps)
        case "cosine":
            decay = optax.cosine_decay_schedule(peak, steps, alpha=config.min_lr_ratio)
    if warmup == 0:
        return decay
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), decay], [warmup])


def decay_mask(params: Any) -> Any:
    """True where weight decay applies. Scanned layers stack their norm scales and biases to 2-D, so names decide too."""

    def decays(path: tuple, leaf: jax.Array) -> bool:
        names = jax.tree_util.keystr(path, simple=True, separator="/").split("/")
        return leaf.ndim > 1 and UNDECAYED.isdisjoint(names)

    return jax.tree_util.tree_map_with_path(decays, params)


def _in_float32(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """Moments of bfloat16 parameters, too, are kept in float32; optax would give them the parameters' type."""

    def init(params: Any) -> Any:
        return inner.init(optax_tree.cast(params, jnp.float32))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        return inner.update(optax_tree.cast(updates, jnp.float32), state, optax_tree.cast(params, jnp.float32))

    return optax.GradientTransformation(init, update)
