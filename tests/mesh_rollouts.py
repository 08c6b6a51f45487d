"""Rollouts, gradients and rewards on meshes of eight simulated devices, against one device (a script; prints JSON lines)."""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import tests.conftest  # noqa: F401  precision and compilation cache
from sif_jax.config import MeshConfig, RewardsConfig
from sif_jax.models.qwen2_5_vl.axes import place_parameters
from sif_jax.models.qwen2_5_vl.config import Qwen2_5_VLConfig, TextConfig, VisionConfig
from sif_jax.models.qwen2_5_vl.model import Qwen2_5_VL
from sif_jax.parallel.mesh import make_mesh
from sif_jax.parallel.partition import sharding
from sif_jax.parallel.placement import put, shard_groups
from sif_jax.rewards import score
from sif_jax.rewards.packing import pack
from sif_jax.rewards.scoring import _rules, _verdicts
from sif_jax.rewards.terms import reward_terms
from sif_jax.rollout.engine import encode_images, generate
from sif_jax.rollout.sampling import Sampling, sample_keys
from sif_jax.sif.grammar import BoxDepth, Step, parse, render
from sif_jax.sif.record import Record
from sif_jax.training.policy import completion_logprobs

SAMPLES, LENGTH, PATCHES = 8, 12, 16
TEXT = TextConfig(64, 32, 48, 2, 4, 2, 1e-6, 1e4, (2, 1, 1), True)
VISION = VisionConfig(2, 16, 24, 2, 32, (1,), window_size=56)


def tiny_model():
    return Qwen2_5_VL(Qwen2_5_VLConfig(TEXT, VISION, 60, 61, 62, 63), rngs=nnx.Rngs(params=0))


def prompts_with_images(prompts: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    batch = {
        "tokens": rng.integers(0, 60, (prompts, LENGTH)).astype(np.int32),
        "positions": np.tile(np.arange(LENGTH, dtype=np.int32)[None, :, None], (prompts, 1, 3)),
        "segments": np.ones((prompts, LENGTH), np.int32),
        "loss_mask": np.zeros((prompts, LENGTH), np.float32),
        "image_index": np.full((prompts, LENGTH), -1, np.int32),
        "patches": rng.normal(size=(prompts, PATCHES, 1176)).astype(np.float32),
        "patch_positions": np.zeros((prompts, PATCHES, 2), np.int32),
        "patch_segments": np.ones((prompts, PATCHES), np.int32),
        "windows": np.tile(np.arange(PATCHES, dtype=np.int32)[None, None], (prompts, 1, 1)),
        "window_segments": np.ones((prompts, 1, PATCHES), np.int32),
        "window_slot": np.tile(np.arange(PATCHES, dtype=np.int32)[None], (prompts, 1)),
    }
    batch["image_index"][:, 2:6] = np.arange(4)
    return batch


def sample_and_differentiate(model, batch, keys, rows=None):
    graphdef, state = nnx.split(model)
    features = encode_images(graphdef, (state,), batch)
    rollout = generate(graphdef, (state,), batch, features, keys, sampling=Sampling(9, (1,)), pad_id=0, rows=rows)
    ids = jax.device_put(rollout.ids, keys.sharding)

    def loss(state):
        logprobs, _ = completion_logprobs(nnx.merge(graphdef, state, copy=True), batch, None, ids, temperature=1.0)
        return logprobs.mean()

    return ids, rollout.logprobs, jax.jit(jax.value_and_grad(loss))(state)


def answers(count: int) -> tuple[list[str], list[Record]]:
    """Traces with random boxes, and what they are held to."""
    rng = np.random.default_rng(1)

    def box():
        return tuple(np.round(np.concatenate([rng.uniform(0, 0.4, 2), rng.uniform(0.5, 1, 2)]), 3).tolist())

    def step():
        return Step(tuple(BoxDepth(box(), float(rng.random())) for _ in range(rng.integers(1, 4))), "here")

    texts = [render([step() for _ in range(rng.integers(1, 4))], "yes") for _ in range(count)]
    gold = [tuple(box() for _ in range(rng.integers(1, 4))) for _ in range(count)]
    named = {"dataset": "d", "image": "i.png", "depth_image": "d.png", "problem": "Q", "response": "yes"}
    return texts, [Record(**named, gold_boxes=boxes) for boxes in gold]


def rewards(mesh=None):
    """By `score`, as training calls it, and by the compiled terms with the completions split over the devices."""
    count = 64
    texts, records = answers(count)
    rng = np.random.default_rng(2)
    judged, previous = rng.random(count), rng.random(count)
    depth = [rng.random((8, 8)).astype(np.float32) for _ in range(count)]
    scores = score(texts, records, judge_scores=judged, previous_means=previous, depth_maps=depth)
    traces, settings = [parse(text) for text in texts], RewardsConfig()
    packed = pack(traces, records, depth)
    verdicts = _verdicts(traces, judged, previous, settings, len(packed.mask))
    if mesh is not None:
        packed, verdicts = (jax.tree.map(lambda x: by_rows(x, mesh), tree) for tree in (packed, verdicts))
    return vars(scores), reward_terms(packed, verdicts, _rules(settings))


def by_rows(x, mesh):
    x = np.asarray(x)
    return put(x, sharding(mesh, ("batch", *(None,) * (x.ndim - 1)), x.shape)) if x.ndim else x


def largest_difference(tree, expected) -> float:
    pairs = zip(jax.tree.leaves(tree), jax.tree.leaves(expected), strict=True)
    return max(float(np.abs(np.asarray(a, np.float64) - np.asarray(b, np.float64)).max()) for a, b in pairs)


def main() -> None:
    prompts, *shapes = sys.argv[1:]
    batch, keys = prompts_with_images(int(prompts)), sample_keys(0, 0, np.arange(int(prompts)), SAMPLES)
    expected = sample_and_differentiate(tiny_model(), jax.tree.map(jnp.asarray, batch), keys)
    earned = rewards()
    for shape in shapes:
        sizes = {axis: int(size) for axis, size in (part.split("=") for part in shape.split(","))}
        mesh = make_mesh(MeshConfig(**sizes))
        with jax.set_mesh(mesh):
            model = tiny_model()
            place_parameters(model, mesh)
            found = sample_and_differentiate(model, *shard_groups(batch, keys, mesh), rows=int(prompts) * SAMPLES // 2)
            line = {
                "mesh": shape,
                "devices": len(found[0].sharding.device_set),
                "same_ids": bool((np.asarray(found[0]) == np.asarray(expected[0])).all()),
                "error": largest_difference(found[1:], expected[1:]),
                "rewards_error": largest_difference(rewards(mesh), earned),
            }
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
