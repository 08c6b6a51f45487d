"""GRPO-SIF: group-relative policy optimisation with the format, answer, box and depth rewards (io).

The loop, as in the paper: prompts → N completions each → rewards → advantages within each group → clipped update with the
KL to the policy that the run started from. While the judge is asked, the device computes that policy's log-probabilities.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from functools import partial, reduce
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float, Key, Shaped

from sif_jax.config import GrpoConfig, flat_config
from sif_jax.data.feed import open_feed
from sif_jax.errors import PreemptedError
from sif_jax.judge import Judge, JudgeStoppedError, open_judge
from sif_jax.models.qwen2_5_vl.layer_arrays import AnyState, merge_model
from sif_jax.models.qwen2_5_vl.model import Batch
from sif_jax.ops.packing import Packing
from sif_jax.parallel.distributed import data_shard, gather_rows, is_first
from sif_jax.parallel.mesh import make_mesh
from sif_jax.parallel.placement import WHOLE, put_groups, shard_groups, split_by_prompts
from sif_jax.progress import Progress
from sif_jax.rollout.engine import Rollout, encode_images, generate
from sif_jax.rollout.sampling import Sampling, sample_keys
from sif_jax.rollout.schedule import Usage
from sif_jax.training.accounts import share_of_account, share_of_caps, whole_account
from sif_jax.training.checkpoint import Checkpoints
from sif_jax.training.drift import SamplerDrift, sampler_drift
from sif_jax.training.feedback import Feedback, reward_rollout, submit_rollout
from sif_jax.training.groups import (
    Completions,
    Groups,
    join_rows,
    pack_completions,
    share_of_padding,
    split_rows,
    to_learn,
)
from sif_jax.training.metrics import open_log, padding
from sif_jax.training.nonfinite import FiniteCheck
from sif_jax.training.objective import PolicyLoss, policy_loss
from sif_jax.training.optimizer import learning_rate, make_optimizer
from sif_jax.training.policy import completion_logprobs
from sif_jax.training.policy_files import Policy, export_policy, open_policy
from sif_jax.training.preemption import Preemption
from sif_jax.training.reference import Reference, reference_logprobs, reference_of
from sif_jax.training.retention import MeanScore
from sif_jax.training.run_dir import open_run_together
from sif_jax.training.samples import SampleLog
from sif_jax.training.state import (
    StateShardings,
    TrainState,
    accumulate,
    from_zeros,
    initial_state,
    make_apply,
    num_steps,
    state_shardings,
)


class Sums(NamedTuple):
    """Over the tokens that count in the loss."""

    policy: PolicyLoss
    entropy: Float[Array, ""]  # nats
    sampler: SamplerDrift

    def plus(self, other: Sums) -> Sums:
        return Sums(self.policy.plus(other.policy), self.entropy + other.entropy, self.sampler.plus(other.sampler))


def train(config: GrpoConfig) -> Path:
    """Run one GRPO-SIF training, or resume it; its directory then holds checkpoints, metrics and the exported model."""
    mesh = make_mesh(config.mesh)
    split_by_prompts(config.micro_batch, config.num_samples, mesh)
    directory = open_run_together(config)
    with jax.set_mesh(mesh), closing(open_judge(share_of_caps(config.judge))) as judge:
        return _train(config, directory, mesh, judge)


def _train(config: GrpoConfig, directory: Path, mesh: Mesh, judge: Judge) -> Path:
    policy = open_policy(
        config.model, lora=config.lora, freeze_vision=config.freeze_vision, seed=config.run.seed, mesh=mesh
    )
    by_prompts = split_by_prompts(config.micro_batch, config.num_samples, mesh)
    shard = data_shard(mesh) if by_prompts else WHOLE
    feed = open_feed(
        config.data,
        config.prompt,
        policy.processor,
        policy.config.vision,
        target="none",
        batch_size=config.prompts_per_step,
        seed=config.run.seed,
        shard=shard.index,
        num_shards=shard.count,
        fixed_shape=jax.process_count() > 1,
    )
    whole = num_steps(len(feed.records) * config.epochs, config.prompts_per_step)
    steps = min(config.max_steps or whole, whole)
    optimizer = make_optimizer(config.optimizer, steps * config.updates_per_rollout)
    rate = learning_rate(config.optimizer, steps * config.updates_per_rollout)
    where, frozen = state_shardings(policy.trainable, optimizer, mesh), policy.frozen
    gradients = make_gradients(policy.graphdef, config, where)
    add_gradients = from_zeros(gradients, config.prompts_per_step // config.micro_batch)
    apply = make_apply(optimizer, where)
    state = initial_state(policy.trainable, optimizer, where)
    reference = reference_of(policy.graphdef, state.trainable, frozen) if config.objective.kl_beta else None
    previous_means = np.full(len(feed.records), np.nan, np.float32)
    best, check_finite = MeanScore(config.run.keep_best), FiniteCheck(config, feed)

    with ExitStack() as stack:
        preemption = stack.enter_context(Preemption(directory))
        checkpoints = stack.enter_context(Checkpoints(directory / "checkpoints", config.run.keep, config.run.keep_best))
        start, saved, host = checkpoints.resume({"state": state, "previous_means": previous_means})
        if host is not None:
            state, previous_means = saved["state"], saved["previous_means"]
            feed.loader.set_state(host["loader"])
            best.set_state(host["best"])
            judge.set_state(share_of_account(host["judge"]))
        log = stack.enter_context(closing(open_log(directory, config.run, start_step=start)))
        progress = stack.enter_context(closing(Progress("grpo", steps, start=start, shown=is_first())))
        samples = SampleLog(directory, config, feed, log)

        def save(step: int, loader: dict[str, int], score: float | None) -> None:
            host = {"loader": loader, "best": best.get_state(), "judge": whole_account(judge)}
            arrays = {"state": state, "previous_means": previous_means}
            checkpoints.save(step, arrays=arrays, host=host | {"config": flat_config(config)}, score=score)

        for step in range(start, steps):
            times, loader_before, check = [time.monotonic()], feed.loader.get_state(), partial(preemption.check, step)
            try:  # until the first update the step can be given up, and done again from what is saved here
                check()
                prompts = next(feed.loader)
                ids = gather_rows([index for (index,) in prompts.records], shard)
                keys = sample_keys(config.run.seed, step, ids, config.num_samples)
                batch, _ = shard_groups(prompts.arrays, keys, mesh, by_prompts=by_prompts, shard=shard)
                rollout, features, usage = sample(policy, (state.trainable, frozen), batch, keys, config, between=check)
                times.append(time.monotonic())

                submitted = submit_rollout(judge, rollout, feed, ids, policy.processor)
                completions = to_learn(batch, features, rollout, config).on_mesh(mesh, by_prompts=by_prompts)
                packings = pack_completions(np.asarray(rollout.lengths), completions.ids.shape[-1], config, mesh)
                reference_logps = refer(reference, completions, packings, config)
                feedback = reward_rollout(submitted, feed, previous_means[ids], config, meanwhile=check)
                times.append(time.monotonic())

                valid = feedback.scores.valid.reshape(rollout.lengths.shape)
                earned = (put_groups(x, mesh, by_prompts=by_prompts) for x in (feedback.advantages, valid))
                groups = Groups(completions, reference_logps, *earned)
                gathered = sum_gradients(add_gradients, state, frozen, groups, packings, config, between=check)
            except (JudgeStoppedError, PreemptedError):
                save(step, loader_before, best.value)
                checkpoints.finish()
                raise
            updates, norm = [], jnp.zeros(())
            while len(updates) < config.updates_per_rollout and jnp.isfinite(norm):
                if updates:
                    gathered = sum_gradients(add_gradients, state, frozen, groups, packings, config)
                gradients, sums = gathered
                state, norm = apply(state, gradients, sums.policy.count)
                updates.append(sums)
            previous_means[ids] = feedback.means_after(previous_means[ids], config.rewards.compat)
            jax.block_until_ready(state)
            times.append(time.monotonic())

            metrics = _metrics(feedback, rollout, updates, config) | {
                "grad_norm": float(norm),
                "learning_rate": float(jnp.asarray(rate(step * config.updates_per_rollout))),
                **padding(prompts.waste),
                "padding/row_steps": 1 - usage.share,
                "padding/completions": share_of_padding(completions, packings, int(rollout.lengths.sum())),
            }
            seen = prompts._replace(arrays=prompts.arrays | _dumped(rollout, feedback))
            tensors = {"gradients": gradients, "weights": state.trainable}
            check_finite(step, {name: metrics[name] for name in ("loss", "grad_norm")}, [seen], tensors)
            samples.log(step, ids, rollout, feedback)
            best.add(metrics)
            if (step + 1) % config.run.log_every == 0:
                log.log(step, metrics | _rates(times, int(rollout.lengths.sum())))
            progress.advance(reward=metrics["reward/total"], length=metrics["completion_length"])
            if (step + 1) % config.run.save_every == 0 or step + 1 == steps:
                save(step + 1, feed.loader.get_state(), best.take())

        checkpoints.finish()
        preemption.check(steps)
        feed.report_skipped()
        export_policy(policy, state.trainable, directory)
    return directory


def sample(
    policy: Policy,
    states: tuple[AnyState, ...],
    batch: Batch,
    keys: Key[Array, "P M"],
    config: GrpoConfig,
    *,
    between: Callable[[], None] | None = None,
) -> tuple[Rollout, Shaped[Array, "P I D"], Usage]:
    """N completions of every prompt, the image features they saw, and how well the rows were used.

    `between` is called while the rollout is under way; what it raises ends it.
    """
    processor, mesh = policy.processor, jax.sharding.get_abstract_mesh()
    sampling = Sampling(
        max_new_tokens=config.max_new_tokens,
        stop_ids=processor.eos_ids,
        forbidden_ids=processor.forbidden_ids(policy.config.text.vocab_size),
        temperature=config.temperature,
        top_k=config.top_k,
        top_p=config.top_p,
        min_p=config.min_p,
        stop=config.stop,
    )
    features, usage = encode_images(policy.graphdef, states, batch), Usage()
    rollout = generate(
        policy.graphdef,
        states,
        batch,
        features,
        keys,
        sampling=sampling,
        pad_id=processor.pad_id,
        by_prompts=split_by_prompts(config.micro_batch, config.num_samples, mesh),
        rows=config.decode_rows,
        prefill=config.micro_batch,
        decode_text=processor.decode,
        usage=usage,
        separate=config.separate_layers,
        between=between,
    )
    return rollout, features, usage


def refer(
    reference: Reference | None, completions: Completions, packings: Sequence[Packing | None], config: GrpoConfig
) -> Float[Array, "P M T"] | None:
    """What the reference policy says about the completions; returns before the device is done."""
    if reference is None:
        return None
    parts = [
        reference_logprobs(
            *reference, rows.batch, rows.features, rows.ids, rows.token_mask, packing, temperature=config.temperature
        )
        for rows, packing in zip(split_rows(completions, config.micro_batch), packings, strict=True)
    ]
    return join_rows(parts)


def sum_gradients(
    add_gradients: Callable[..., tuple[nnx.State, Sums]],
    state: TrainState,
    frozen: AnyState,
    groups: Groups,
    packings: Sequence[Packing | None],
    config: GrpoConfig,
    *,
    between: Callable[[], None] | None = None,
) -> tuple[nnx.State, Sums]:
    """Over the micro-batches of a rollout; `between` is called before each."""
    gathered: Any = None
    key = jax.random.fold_in(jax.random.key(config.run.seed), state.step)
    for part, (rows, packing) in enumerate(zip(split_rows(groups, config.micro_batch), packings, strict=True)):
        if between is not None:
            between()
        gathered = add_gradients(gathered, state.trainable, frozen, rows, jax.random.fold_in(key, part), packing)
    return gathered


def make_gradients(
    graphdef: nnx.GraphDef, config: GrpoConfig, shardings: StateShardings | None = None
) -> Callable[..., Any]:
    """(earlier or None, trainable, frozen, groups, key, packing or None) → (summed gradients, Sums)."""
    on_policy = config.updates_per_rollout == 1
    dropout = config.lora is not None and config.lora.dropout > 0

    def gradients(
        trainable: nnx.State, frozen: AnyState, groups: Groups, key: Array, packing: Packing | None = None
    ) -> tuple[nnx.State, Sums]:
        sampled = groups.completions

        def loss(trainable: nnx.State) -> tuple[Array, Sums]:
            logprobs, entropy = completion_logprobs(
                merge_model(graphdef, trainable, frozen, copy=True),
                sampled.batch,
                sampled.features,
                sampled.ids,
                sampled.token_mask,
                temperature=config.temperature,
                packing=packing,
                key=key if dropout else None,
            )
            constant = jax.lax.stop_gradient(logprobs)
            policy = policy_loss(
                logprobs,
                constant if on_policy else sampled.logprobs,
                groups.reference_logprobs,
                groups.advantages,
                sampled.token_mask,
                groups.valid,
                objective=config.objective,
                max_new_tokens=config.max_new_tokens,
            )
            counted = sampled.token_mask & groups.valid[..., None]
            drift = sampler_drift(constant, sampled.logprobs, counted)
            return policy.loss, Sums(policy, jnp.sum(entropy * counted), drift)

        (_, sums), gradients = jax.value_and_grad(loss, has_aux=True)(trainable)
        return gradients, sums

    return accumulate(gradients, plus=Sums.plus, shardings=shardings)


def _metrics(feedback: Feedback, rollout: Rollout, updates: Sequence[Sums], config: GrpoConfig) -> dict[str, float]:
    """The table in docs/grpo.md; of several updates on one rollout, their means."""
    first, all_sums = updates[0], reduce(Sums.plus, updates)
    policy, tokens = all_sums.policy, max(float(all_sums.policy.tokens), 1)
    low, high = float(policy.clipped_low) / tokens, float(policy.clipped_high) / tokens
    return (
        feedback.metrics()
        | ({"kl": float(policy.kl) / tokens} if config.objective.kl_beta else {})
        | {
            "loss": float(policy.loss) / max(float(policy.count), 1),
            "clip_fraction": low + high,
            "clip_fraction_low": low,
            "clip_fraction_high": high,
            "ratio_mean": float(policy.ratio) / tokens,
            "ratio_max": float(policy.ratio_max),
            **first.sampler.metrics(max(float(first.policy.tokens), 1)),
            "entropy": float(all_sums.entropy) / tokens,
            "completion_length": float(rollout.lengths.mean()),
            "completion_length_max": float(rollout.lengths.max()),
            "truncated": float(1 - rollout.finished.mean()),
        }
    )


def _dumped(rollout: Rollout, feedback: Feedback) -> dict[str, Any]:
    """What a step that is not finite was computed from, beside its prompts."""
    return {f"rollout_{name}": value for name, value in rollout._asdict().items()} | {"advantages": feedback.advantages}


def _rates(times: Sequence[float], tokens: int) -> dict[str, float]:
    seconds = dict(zip(("rollout", "judge", "learn"), np.diff(times), strict=True))
    return {f"seconds/{phase}": float(spent) for phase, spent in seconds.items()} | {
        f"tokens_per_second/{phase}": tokens / float(spent) for phase, spent in seconds.items()
    }
