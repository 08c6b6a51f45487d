"""Eight simulated devices compute what one does: samples, gradients and losses."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import sys
import jax, jax.numpy as jnp, numpy as np
from flax import nnx
jax.config.update("jax_default_matmul_precision", "highest")
from sif_jax.models.qwen2_5_vl.config import Qwen2_5_VLConfig, TextConfig, VisionConfig
from sif_jax.models.qwen2_5_vl.model import Qwen2_5_VL
from sif_jax.config import MeshConfig
from sif_jax.parallel.mesh import make_mesh
from sif_jax.parallel.placement import replicate, shard_groups
from sif_jax.rollout.engine import encode_images, generate
from sif_jax.rollout.sampling import Sampling, sample_keys
from sif_jax.training.policy import completion_logprobs

prompts, samples, length = int(sys.argv[1]), 8, 12
text = TextConfig(64, 32, 48, 2, 4, 2, 1e-6, 1e4, (2, 1, 1), True)
vision = VisionConfig(2, 16, 24, 2, 32, (1,), window_size=56)
model = Qwen2_5_VL(Qwen2_5_VLConfig(text, vision, 60, 61, 62, 63), rngs=nnx.Rngs(params=0))
graphdef, state = nnx.split(model)
rng = np.random.default_rng(0)
batch = {
    "tokens": rng.integers(0, 60, (prompts, length)).astype(np.int32),
    "positions": np.tile(np.arange(length, dtype=np.int32)[None, :, None], (prompts, 1, 3)),
    "segments": np.ones((prompts, length), np.int32),
    "loss_mask": np.zeros((prompts, length), np.float32),
    "image_index": np.full((prompts, length), -1, np.int32),
    "patches": rng.normal(size=(prompts, 16, 1176)).astype(np.float32),
    "patch_positions": np.zeros((prompts, 16, 2), np.int32),
    "patch_segments": np.ones((prompts, 16), np.int32),
    "windows": np.tile(np.arange(16, dtype=np.int32)[None, None], (prompts, 1, 1)),
    "window_segments": np.ones((prompts, 1, 16), np.int32),
    "window_slot": np.tile(np.arange(16, dtype=np.int32)[None], (prompts, 1)),
}
batch["image_index"][:, 2:6] = np.arange(4)

def run(batch, keys, states, rows=None):
    features = encode_images(graphdef, states, batch)
    rollout = generate(graphdef, states, batch, features, keys, sampling=Sampling(9, (1,)), pad_id=0, rows=rows)
    ids = jax.device_put(rollout.ids, keys.sharding)
    def loss(state):
        logprobs, _ = completion_logprobs(nnx.merge(graphdef, state, copy=True), batch, None, ids, temperature=1.0)
        return logprobs.mean()
    value, gradients = jax.jit(jax.value_and_grad(loss))(states[0])
    return ids, value, gradients

keys = sample_keys(0, 0, np.arange(prompts), samples)
one = run(jax.tree.map(jnp.asarray, batch), keys, (state,))
mesh = make_mesh(MeshConfig(**{axis: int(size) for axis, size in (word.split("=") for word in sys.argv[2:])}))
assert mesh.size == 8
with jax.set_mesh(mesh):
    eight = run(*shard_groups(batch, keys, mesh), (replicate(state, mesh),), rows=prompts * samples // 2)
assert len(eight[0].sharding.device_set) == 8 and not eight[0].is_fully_replicated
np.testing.assert_array_equal(one[0], eight[0])
for a, b in zip(jax.tree.leaves(one[1:]), jax.tree.leaves(eight[1:]), strict=True):
    np.testing.assert_allclose(a, b, atol=1e-5)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("prompts", "mesh"),
    [(8, []), (2, []), (8, ["fsdp=4"]), (4, ["fsdp=2", "tensor=2"])],
    ids=["prompts are split", "samples are split", "data and fsdp", "data, fsdp and tensor"],
)
def test_eight_devices_sample_and_differentiate_as_one_does(prompts, mesh):
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    root = Path(__file__).parents[1]
    subprocess.run([sys.executable, "-c", SCRIPT, str(prompts), *mesh], env=environment, check=True, cwd=root)
