"""One update of SFT and of GRPO on meshes of eight simulated devices, and on one device (a script; prints JSON lines)."""

import json
import sys
from pathlib import Path

import jax
import numpy as np
from jax.sharding import AxisType

import tests.conftest  # noqa: F401  precision and compilation cache
from sif_jax.config import GrpoConfig, MeshConfig, SftConfig
from sif_jax.config.mesh import AXES
from sif_jax.data.feed import open_feed
from sif_jax.parallel.mesh import make_mesh
from sif_jax.parallel.placement import put_groups, shard_groups, shard_rows, split_by_prompts
from sif_jax.rollout.engine import Rollout, encode_images
from sif_jax.training import grpo, sft
from sif_jax.training.groups import Groups, pack_completions, to_learn
from sif_jax.training.optimizer import make_optimizer
from sif_jax.training.policy_files import open_policy
from sif_jax.training.reference import reference_of
from sif_jax.training.state import from_zeros, initial_state, make_apply, state_shardings
from tests.tiny_run import DEMO, tiny_config

# SGD-like: with a large eps Adam's update is proportional to the gradient, so that errors are not blown up.
SGD = ["optimizer.eps=1.0", "optimizer.learning_rate=1.0", "optimizer.max_grad_norm=null", "freeze_vision=false"]
ADAPTER = ["lora={rank: 4, dropout: 0.1}"]
KINDS = {"full": [], "lora": ADAPTER, "apart": [*ADAPTER, "model.scan_layers=false"]}
FEED = {"sft": ["batch_size=8"], "grpo": ["prompts_per_step=8", "micro_batch=8", "num_samples=8"]}
HALF = {"sft": [], "grpo": ["micro_batch=4"]}


def opened(config, target, rows, mesh):
    policy = open_policy(config.model, lora=config.lora, freeze_vision=config.freeze_vision, seed=0, mesh=mesh)
    feed = open_feed(config.data, config.prompt, policy.processor, policy.config.vision, target=target, batch_size=rows)
    optimizer = make_optimizer(config.optimizer, 10)
    where = state_shardings(policy.trainable, optimizer, mesh)
    return policy, next(feed.loader).arrays, where, make_apply(optimizer, where), optimizer


def sft_update(config, mesh):
    policy, arrays, where, apply, optimizer = opened(config, "cot", config.batch_size, mesh)
    gradients = sft.make_gradients(policy.graphdef, dropout=config.lora is not None, shardings=where)
    state = initial_state(policy.trainable, optimizer, where)
    summed, sums = gradients(None, state.trainable, policy.frozen, shard_rows(arrays, mesh), jax.random.key(1))
    return (summed, sums, *apply(state, summed, sums.tokens))


def grpo_update(config, mesh):
    policy, arrays, where, apply, optimizer = opened(config, "none", config.prompts_per_step, mesh)
    rng, shape = np.random.default_rng(0), (config.prompts_per_step, config.num_samples)
    ids = rng.integers(0, 400, (*shape, config.max_new_tokens)).astype(np.int32)
    lengths = rng.integers(1, config.max_new_tokens + 1, shape).astype(np.int32)
    rollout = Rollout(ids, np.full(ids.shape, -6.0, np.float32), lengths, np.ones(shape, bool))
    by_prompts = split_by_prompts(config.micro_batch, config.num_samples, mesh)
    keys = jax.random.split(jax.random.key(0), shape)
    batch, keys = shard_groups(arrays, keys, mesh, by_prompts=by_prompts)
    assert keys.shape == shape
    features = encode_images(policy.graphdef, (policy.trainable, policy.frozen), batch)
    completions = to_learn(batch, features, rollout, config).on_mesh(mesh, by_prompts=by_prompts)
    reference = reference_of(policy.graphdef, policy.trainable, policy.frozen)
    advantages, valid = rng.normal(size=shape).astype(np.float32), rng.random(shape) < 0.9
    earned = (put_groups(x, mesh, by_prompts=by_prompts) for x in (advantages, valid))
    packings = pack_completions(lengths, completions.ids.shape[-1], config, mesh)
    assert all(packing is not None for packing in packings)
    groups = Groups(completions, grpo.refer(reference, completions, packings, config), *earned)
    add = from_zeros(grpo.make_gradients(policy.graphdef, config, where), len(packings))
    state = initial_state(policy.trainable, optimizer, where)
    summed, sums = grpo.sum_gradients(add, state, policy.frozen, groups, packings, config)
    return (summed, sums, *apply(state, summed, sums.policy.count))


UPDATES = {"sft": (SftConfig, sft_update), "grpo": (GrpoConfig, grpo_update)}


def one_device():
    return jax.make_mesh((1,) * len(AXES), AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=jax.devices()[:1])


def update(stage: str, kind: str, mesh, *overrides: str):
    config, run = UPDATES[stage]
    with jax.set_mesh(mesh):
        return run(tiny_config(config, Path("unused"), *SGD, *KINDS[kind], *FEED[stage], *overrides), mesh)


def largest_error(results, expected) -> float:
    """Over loss, gradients, moments and parameters, relative to the largest value of each array, or 1 if that is less."""
    pairs = zip(jax.tree.leaves(results), jax.tree.leaves(expected), strict=True)
    return max(float(np.abs(np.asarray(a) - np.asarray(b)).max() / max(np.abs(b).max(), 1)) for a, b in pairs)


def held(state) -> float:
    """The share of the state that the first device holds."""
    leaves = jax.tree.leaves((state.trainable, state.moments))
    return sum(x.addressable_shards[0].data.nbytes for x in leaves) / sum(x.nbytes for x in leaves)


def main() -> None:
    DEMO.append("tiny_model.num_key_value_heads=2")  # so that two devices can share them
    stage, kind, *shapes = sys.argv[1:]
    expected = update(stage, kind, one_device())
    for shape in shapes:
        sizes = dict(part.split("=") for part in shape.split(","))
        halved = HALF[stage] if kind == "full" else []  # each micro-batch draws its own dropout
        results = update(
            stage, kind, make_mesh(MeshConfig(**{axis: int(size) for axis, size in sizes.items()})), *halved
        )
        line = {"mesh": shape, "error": largest_error(results, expected), "held": held(results[2])}
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
