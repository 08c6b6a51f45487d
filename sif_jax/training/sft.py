"""Supervised fine-tuning on the chains of thought (io).

The loop: batch → summed gradients of its micro-batches → one optimizer step → metrics → checkpoint.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array

from sif_jax.config import SftConfig, flat_config
from sif_jax.data.feed import open_feed
from sif_jax.errors import PreemptedError
from sif_jax.models.qwen2_5_vl.layer_arrays import AnyState, merge_model
from sif_jax.models.qwen2_5_vl.model import Batch
from sif_jax.parallel.distributed import data_shard, is_first
from sif_jax.parallel.mesh import make_mesh
from sif_jax.parallel.placement import check_rows, shard_rows
from sif_jax.progress import Progress
from sif_jax.training.checkpoint import Checkpoints
from sif_jax.training.metrics import open_log, padding
from sif_jax.training.nonfinite import FiniteCheck
from sif_jax.training.optimizer import learning_rate, make_optimizer
from sif_jax.training.policy import TokenSums, next_token_loss
from sif_jax.training.policy_files import export_policy, open_policy
from sif_jax.training.preemption import Preemption
from sif_jax.training.retention import MeanScore
from sif_jax.training.run_dir import open_run_together
from sif_jax.training.state import (
    StateShardings,
    accumulate,
    from_zeros,
    initial_state,
    make_apply,
    num_steps,
    state_shardings,
)


def train(config: SftConfig) -> Path:
    """Run one fine-tuning, or resume it; its directory then holds checkpoints, metrics and the exported model."""
    mesh = make_mesh(config.mesh)
    check_rows(config.batch_size, mesh)
    directory = open_run_together(config)
    with jax.set_mesh(mesh):
        return _train(config, directory, mesh)


def _train(config: SftConfig, directory: Path, mesh: Mesh) -> Path:
    policy = open_policy(
        config.model, lora=config.lora, freeze_vision=config.freeze_vision, seed=config.run.seed, mesh=mesh
    )
    shard = data_shard(mesh)
    feed = open_feed(
        config.data,
        config.prompt,
        policy.processor,
        policy.config.vision,
        target=config.target,
        batch_size=config.batch_size,
        seed=config.run.seed,
        pack=config.packing,
        shard=shard.index,
        num_shards=shard.count,
        fixed_shape=jax.process_count() > 1,
    )
    whole = num_steps(len(feed.records) * config.epochs, config.batch_size * config.accumulation)
    steps = config.max_steps if config.max_steps and config.packing else min(config.max_steps or whole, whole)
    optimizer = make_optimizer(config.optimizer, steps)
    dropout = config.lora is not None and config.lora.dropout > 0
    where = state_shardings(policy.trainable, optimizer, mesh)
    gradients = make_gradients(policy.graphdef, dropout=dropout, packed=config.packing, shardings=where)
    add_gradients, apply = from_zeros(gradients, config.accumulation), make_apply(optimizer, where)
    state = initial_state(policy.trainable, optimizer, where)
    rate, key = learning_rate(config.optimizer, steps), jax.random.key(config.run.seed)
    best, check_finite = MeanScore(config.run.keep_best), FiniteCheck(config, feed)

    with ExitStack() as stack:
        preemption = stack.enter_context(Preemption(directory))
        checkpoints = stack.enter_context(Checkpoints(directory / "checkpoints", config.run.keep, config.run.keep_best))
        start, saved, host = checkpoints.resume({"state": state})
        if host is not None:
            state = saved["state"]
            feed.loader.set_state(host["loader"])
            best.set_state(host["best"])
        log = stack.enter_context(closing(open_log(directory, config.run, start_step=start)))
        progress = stack.enter_context(closing(Progress("sft", steps, start=start, shown=is_first())))

        def save(step: int, score: float | None) -> None:
            host = {"loader": feed.loader.get_state(), "best": best.get_state(), "config": flat_config(config)}
            checkpoints.save(step, arrays={"state": state}, host=host, score=score)

        for step in range(start, steps):
            try:
                preemption.check(step)
            except PreemptedError:
                save(step, best.value)
                checkpoints.finish()
                raise
            began, batches = time.monotonic(), []
            gathered: Any = None
            for micro in range(step * config.accumulation, (step + 1) * config.accumulation):
                batches.append(next(feed.loader))
                batch = shard_rows(batches[-1].arrays, mesh, shard)
                gathered = add_gradients(
                    gathered, state.trainable, policy.frozen, batch, jax.random.fold_in(key, micro)
                )
            gradients, sums = gathered
            state, norm = apply(state, gradients, sums.tokens)
            metrics = _metrics(jax.block_until_ready(sums), norm, time.monotonic() - began)
            tensors = {"gradients": gradients, "weights": state.trainable}
            check_finite(step, {name: metrics[name] for name in ("loss", "grad_norm")}, batches, tensors)
            if (step + 1) % config.run.log_every == 0:
                shown = {"learning_rate": float(jnp.asarray(rate(step))), **padding(batches[-1].waste)}
                log.log(step, metrics | shown)
                progress.advance(config.run.log_every, loss=metrics["loss"])
                best.add(metrics)
            if (step + 1) % config.run.save_every == 0 or step + 1 == steps:
                save(step + 1, best.take())

        checkpoints.finish()
        preemption.check(steps)
        feed.report_skipped()
        export_policy(policy, state.trainable, directory)
    return directory


def make_gradients(
    graphdef: nnx.GraphDef, *, dropout: bool, packed: bool = True, shardings: StateShardings | None = None
) -> Callable[..., Any]:
    """(earlier or None, trainable, frozen, batch, key) → (summed gradients, TokenSums)."""

    def gradients(trainable: nnx.State, frozen: AnyState, batch: Batch, key: Array) -> tuple[nnx.State, TokenSums]:
        def loss(trainable: nnx.State) -> tuple[Array, TokenSums]:
            model = merge_model(graphdef, trainable, frozen, copy=True)
            return next_token_loss(model, batch, key if dropout else None, packed=packed)

        (_, sums), gradients = jax.value_and_grad(loss, has_aux=True)(trainable)
        return gradients, sums

    return accumulate(gradients, shardings=shardings)


def _metrics(sums: TokenSums, norm: Array, seconds: float) -> dict[str, float]:
    tokens = float(sums.tokens)
    return {
        "loss": float(sums.nll) / tokens,
        "token_accuracy": float(sums.correct) / tokens,
        "grad_norm": float(norm),
        "target_tokens": tokens,
        "tokens_per_second": tokens / seconds,
    }
