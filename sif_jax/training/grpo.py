"""GRPO-SIF: group-relative policy optimisation with the format, answer, box and depth rewards (io).

The loop, as in the paper: prompts → N completions each → rewards → advantages within each group → clipped update with the
KL to the policy that the run started from.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key, Shaped

from sif_jax.config import GrpoConfig
from sif_jax.data.feed import open_feed
from sif_jax.models.qwen2_5_vl.model import Batch
from sif_jax.parallel.mesh import data_mesh, replicate, shard_groups
from sif_jax.progress import Progress
from sif_jax.rollout.engine import Rollout, encode_images, generate
from sif_jax.rollout.sampling import Sampling, sample_keys
from sif_jax.training.checkpoint import Checkpoints
from sif_jax.training.feedback import Feedback, judge_rollout
from sif_jax.training.metrics import MetricsLog
from sif_jax.training.objective import PolicyLoss, grpo_loss
from sif_jax.training.optimizer import learning_rate, make_optimizer
from sif_jax.training.policy import completion_logprobs
from sif_jax.training.policy_files import Policy, check_finite, export_policy, open_policy
from sif_jax.training.run_dir import open_run
from sif_jax.training.state import accumulate, from_zeros, initial_state, make_apply, num_steps


class Groups(NamedTuple):
    """Prompts with their completions, ready to learn from."""

    batch: Batch
    features: Shaped[Array, "P I D"] | None  # None: the vision tower learns too
    ids: Int[Array, "P M T"]
    old_logprobs: Float[Array, "P M T"]
    token_mask: Bool[Array, "P M T"]
    advantages: Float[Array, "P M"]
    valid: Bool[Array, "P M"]


class Sums(NamedTuple):
    policy: PolicyLoss
    entropy: Float[Array, ""]  # nats, over tokens
    tokens: Float[Array, ""]


def train(config: GrpoConfig) -> Path:
    """Run one GRPO-SIF training, or resume it; its directory then holds checkpoints, metrics and the exported model."""
    directory, mesh = open_run(config), data_mesh()
    policy = open_policy(config.model, lora=config.lora, freeze_vision=config.freeze_vision, seed=config.run.seed)
    feed = open_feed(
        config.data,
        config.prompt,
        policy.processor,
        policy.config.vision,
        target="none",
        batch_size=config.prompts_per_step,
        seed=config.run.seed,
    )
    whole = num_steps(len(feed.records) * config.epochs, config.prompts_per_step)
    steps = min(config.max_steps or whole, whole)
    optimizer = make_optimizer(config.optimizer, steps * config.updates_per_rollout)
    rate = learning_rate(config.optimizer, steps * config.updates_per_rollout)
    add_gradients = from_zeros(make_gradients(policy.graphdef, config), config.prompts_per_step // config.micro_batch)
    apply = make_apply(optimizer)
    state, frozen = replicate((initial_state(policy.trainable, optimizer), policy.frozen), mesh)
    reference = replicate(reference_policy(policy, config), mesh)
    previous_means, start = np.full(len(feed.records), np.nan, np.float32), 0
    checkpoints = Checkpoints(directory / "checkpoints", config.run.keep)
    if checkpoints.latest() is not None:
        start, saved, host = checkpoints.restore(None, {"state": state, "previous_means": previous_means})
        state, previous_means = saved["state"], saved["previous_means"]
        feed.loader.set_state(host["loader"])
    log = MetricsLog(directory, start_step=start, tensorboard=config.run.tensorboard, wandb=config.run.wandb)
    progress = Progress("grpo", steps, start=start)

    for step in range(start, steps):
        began, prompts = time.monotonic(), next(feed.loader)
        ids = np.array([index for (index,) in prompts.records])
        keys = sample_keys(config.run.seed, step, ids, config.num_samples)
        batch, keys = shard_groups(prompts.arrays, keys, mesh)
        rollout, features = sample(policy, (state.trainable, frozen), batch, keys, config)
        sampled = time.monotonic()
        feedback = judge_rollout(rollout, feed, ids, previous_means[ids], policy.processor, config)
        previous_means[ids] = feedback.group_means
        groups = to_learn(batch, features, rollout, feedback, config)
        for _ in range(config.updates_per_rollout):
            gathered: Any = None
            key = jax.random.fold_in(jax.random.key(config.run.seed), state.step)
            for rows in split_rows(groups, config.micro_batch):
                gathered = add_gradients(gathered, state.trainable, frozen, reference, rows, key)
            gradients, sums = gathered
            state, norm = apply(state, gradients, sums.policy.completions)
        metrics = _metrics(feedback, rollout, sums) | {
            "grad_norm": float(norm),
            "learning_rate": float(jnp.asarray(rate(step * config.updates_per_rollout))),
            "padding/tokens": prompts.waste.tokens,
            "padding/patches": prompts.waste.patches,
            "seconds/rollout": sampled - began,
            "seconds/learn": time.monotonic() - sampled,
        }
        check_finite(metrics["loss"], step=step, file=directory)
        if (step + 1) % config.run.log_every == 0:
            log.log(step, metrics)
        progress.advance(reward=metrics["reward/total"], kl=metrics["kl"])
        if (step + 1) % config.run.save_every == 0 or step + 1 == steps:
            arrays = {"state": state, "previous_means": previous_means}
            checkpoints.save(step + 1, arrays=arrays, host={"loader": feed.loader.get_state()})

    for open_file in (log, progress, checkpoints):
        open_file.close()
    feed.report_skipped()
    export_policy(policy, state.trainable, directory)
    return directory


def sample(
    policy: Policy, states: tuple[nnx.State, ...], batch: Batch, keys: Key[Array, "P M"], config: GrpoConfig
) -> tuple[Rollout, Shaped[Array, "P I D"]]:
    """N completions of every prompt, and the image features they saw."""
    processor = policy.processor
    sampling = Sampling(
        max_new_tokens=config.max_new_tokens,
        stop_ids=processor.eos_ids,
        forbidden_ids=processor.forbidden_ids(policy.config.text.vocab_size),
        temperature=config.temperature,
        top_k=config.top_k,
        top_p=config.top_p,
    )
    features = encode_images(policy.graphdef, states, batch)
    rollout = generate(policy.graphdef, states, batch, features, keys, sampling=sampling, pad_id=processor.pad_id)
    return jax.block_until_ready(rollout), features


def to_learn(batch: Batch, features: Array, rollout: Rollout, feedback: Feedback, config: GrpoConfig) -> Groups:
    """Cut the rollout to the shortest of T, T/2, T/4 that holds every completion, so that few programs are compiled."""
    longest = int(rollout.lengths.max())
    length = min(size for size in (config.max_new_tokens // part for part in (4, 2, 1)) if size >= longest)
    token_mask = jnp.arange(length)[None, None] < rollout.lengths[..., None]
    return Groups(
        batch,
        features if config.freeze_vision else None,
        rollout.ids[..., :length],
        rollout.logprobs[..., :length],
        token_mask,
        jnp.asarray(feedback.advantages),
        jnp.asarray(feedback.scores.valid.reshape(rollout.lengths.shape)),
    )


def split_rows(groups: Groups, rows: int) -> list[Groups]:
    """Micro-batches of `rows` prompts."""
    count = len(groups.ids) // rows
    return [jax.tree.map(lambda x, i=i: x[i * rows : (i + 1) * rows], groups) for i in range(count)]


def reference_policy(policy: Policy, config: GrpoConfig) -> nnx.State:
    """The policy at the start of the run: adapters that do nothing, or without LoRA a copy of the trained weights."""
    return jax.tree.map(jnp.zeros_like if config.lora else jnp.copy, policy.trainable)


def make_gradients(graphdef: nnx.GraphDef, config: GrpoConfig) -> Callable[..., Any]:
    """(earlier or None, trainable, frozen, reference, groups, key) → (summed gradients, Sums)."""

    def logprobs_of(trainable: nnx.State, frozen: nnx.State, groups: Groups, key: Array | None):
        model = nnx.merge(graphdef, trainable, frozen, copy=True)
        return completion_logprobs(
            model, groups.batch, groups.features, groups.ids, temperature=config.temperature, key=key
        )

    def gradients(
        trainable: nnx.State, frozen: nnx.State, reference: nnx.State, groups: Groups, key: Array
    ) -> tuple[nnx.State, Sums]:
        reference_logprobs, _ = logprobs_of(reference, frozen, groups, None)

        def loss(trainable: nnx.State) -> tuple[Array, Sums]:
            dropout_key = key if config.lora and config.lora.dropout else None
            logprobs, entropy = logprobs_of(trainable, frozen, groups, dropout_key)
            on_policy = config.updates_per_rollout == 1
            policy_loss = grpo_loss(
                logprobs,
                jax.lax.stop_gradient(logprobs) if on_policy else groups.old_logprobs,
                jax.lax.stop_gradient(reference_logprobs),
                groups.advantages,
                groups.token_mask,
                groups.valid,
                clip_eps=config.objective.clip[0],
                kl_beta=config.objective.kl_beta,
            )
            sums = Sums(policy_loss, jnp.sum(entropy * groups.token_mask), groups.token_mask.sum().astype(jnp.float32))
            return policy_loss.loss, sums

        (_, sums), gradients = jax.value_and_grad(loss, has_aux=True)(trainable)
        return gradients, sums

    return accumulate(gradients)


def _metrics(feedback: Feedback, rollout: Rollout, sums: Sums) -> dict[str, float]:
    completions = float(sums.policy.completions)
    return feedback.metrics() | {
        "loss": float(sums.policy.loss) / max(completions, 1),
        "kl": float(sums.policy.kl) / max(completions, 1),
        "clip_fraction": float(sums.policy.clipped) / max(completions, 1),
        "entropy": float(sums.entropy) / float(sums.tokens),
        "completion_length": float(rollout.lengths.mean()),
        "truncated": float(1 - rollout.finished.mean()),
    }
