"""What a run carries from step to step, and the optimizer step that SFT and GRPO end with (pure, but for where it lies)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from sif_jax.parallel.placement import put


class StateShardings(NamedTuple):
    """Where a TrainState lies; sums and counts lie where the step does, whole on every device."""

    step: NamedSharding
    trainable: Any
    moments: Any

    def of_state(self) -> Any:
        return TrainState._make(self)


class TrainState(NamedTuple):
    step: Int[Array, ""]
    trainable: Any
    moments: optax.OptState


def initial_state(
    trainable: Any, optimizer: optax.GradientTransformation, shardings: StateShardings | None = None
) -> TrainState:
    """Step 0; the moments are born where `shardings` says."""
    step = jnp.int32(0) if shardings is None else put(np.zeros((), np.int32), shardings.step)
    moments = jax.jit(optimizer.init, out_shardings=shardings and shardings.moments)(trainable)
    return TrainState(step, trainable, moments)


def state_shardings(trainable: Any, optimizer: optax.GradientTransformation, mesh: Mesh) -> StateShardings:
    """Each moment lies where its parameter does; what belongs to none is whole on every device."""
    whole = NamedSharding(mesh, PartitionSpec())
    parameters = jax.tree.map(lambda leaf: leaf.sharding, trainable)
    moments = optax.tree.map_params(
        optimizer,
        lambda _, where: where,
        jax.eval_shape(optimizer.init, trainable),
        parameters,
        transform_non_params=lambda _: whole,
    )
    return StateShardings(whole, parameters, moments)


def make_apply(
    optimizer: optax.GradientTransformation, shardings: StateShardings | None = None
) -> Callable[[TrainState, Any, Float[Array, ""]], tuple[TrainState, Float[Array, ""]]]:
    """A jitted function: (state, summed gradients, what to divide them by) → (next state, gradient norm).

    A gradient that is not finite leaves the state as it was. The norm is not finite where the gradient or the new weights
    are not.
    """

    def apply(state: TrainState, gradients: Any, count: Float[Array, ""]) -> tuple[TrainState, Float[Array, ""]]:
        gradients = jax.tree.map(lambda g: g / jnp.maximum(count, 1), gradients)
        updates, moments = optimizer.update(gradients, state.moments, state.trainable)
        trainable = optax.apply_updates(state.trainable, updates)
        norm = optax.tree.norm(gradients)
        following = TrainState(state.step + 1, trainable, moments)
        state = jax.tree.map(lambda new, old: jnp.where(jnp.isfinite(norm), new, old), following, state)
        return state, jnp.where(_all_finite(state.trainable), norm, jnp.nan)

    return jax.jit(apply, donate_argnums=0, out_shardings=shardings and (shardings.of_state(), shardings.step))


def _all_finite(tree: Any) -> Bool[Array, ""]:
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree)]))


def add_trees(one: Any, other: Any) -> Any:
    return jax.tree.map(jnp.add, one, other)


def accumulate(
    function: Callable[..., tuple[Any, Any]],
    plus: Callable[[Any, Any], Any] = add_trees,
    shardings: StateShardings | None = None,
) -> Callable[..., tuple[Any, Any]]:
    """Of a function that returns (gradients, sums): one jitted function that adds them to earlier ones (None at first).

    `plus` adds the sums; zeros must be neutral to it. Gradients lie where `shardings` puts the parameters.
    """

    def added(earlier: Any, *args: Any) -> tuple[Any, Any]:
        gradients, sums = function(*args)
        if earlier is None:
            return gradients, sums
        return add_trees(earlier[0], gradients), plus(earlier[1], sums)

    return jax.jit(added, donate_argnums=0, out_shardings=shardings and (shardings.trainable, shardings.step))


def from_zeros(add: Callable[..., tuple[Any, Any]], parts: int) -> Callable[..., tuple[Any, Any]]:
    """The same accumulation; where a step has several parts, the first adds to zeros, so that all run one program."""

    def added(earlier: Any, trainable: Any, *args: Any) -> tuple[Any, Any]:
        if earlier is None:
            _, sums = jax.eval_shape(add, None, trainable, *args)
            earlier = jax.tree.map(jnp.zeros_like, trainable), _zeros_beside(trainable, sums)
        return add(earlier, trainable, *args)

    return added if parts > 1 else add


def _zeros_beside(trainable: Any, like: Any) -> Any:
    """Zeros that live on the devices of the trainable state."""
    sharding = jax.tree.leaves(trainable)[0].sharding
    if isinstance(sharding, NamedSharding):
        sharding = NamedSharding(sharding.mesh, PartitionSpec())
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype, device=sharding), like)


def num_steps(examples: int, per_step: int) -> int:
    """Whole steps in so many examples, at least one; what is left over opens the next epoch."""
    return max(examples // per_step, 1)
