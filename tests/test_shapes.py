"""However images and texts vary, a run compiles one program per bucket."""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sif_jax.config import BucketsConfig, ModelConfig
from sif_jax.data.batch import Batch, Collator
from sif_jax.data.example import Example
from sif_jax.training.policy_files import open_policy
from sif_jax.training.sft import make_gradients
from tests.checkpoints import tiny_checkpoint

BUCKETS = BucketsConfig(tokens=(128, 128, 192, 256), patches=(0, 96, 192, 288))
LETTERS = list("abcdefghijklmnop   ")


@pytest.fixture(scope="module")
def policy():
    config = ModelConfig(path=str(tiny_checkpoint()), dtype="float32", remat="none")
    return open_policy(config, lora=None, freeze_vision=False, seed=0)


@pytest.fixture(scope="module")
def gradients(policy):
    """The jitted gradient of SFT: (trainable's gradients, sums) of a batch."""
    return make_gradients(policy.graphdef, dropout=False)


def random_example(chat, rng: np.random.Generator, index: int) -> Example:
    """A random text of up to 40 characters and, seven times in ten, one to three images of 8 to 400 pixels a side."""
    sizes = np.exp(rng.uniform(np.log(8), np.log(400), (rng.integers(1, 4), 2))).astype(int)
    shown = sizes if rng.random() < 0.7 else []
    content = [{"type": "image", "image": rng.integers(0, 256, (*size, 3), np.uint8)} for size in shown]
    text = {"type": "text", "text": "".join(rng.choice(LETTERS, rng.integers(1, 40)))}
    encoded, loss_mask = chat.encode_example([{"role": "user", "content": [*content, text]}], "yes")
    return Example(*encoded[:2], loss_mask, encoded.images, index)


def batches(policy, num_examples: int, batch_size: int = 2) -> Iterator[Batch]:
    rng = np.random.default_rng(0)
    collate = Collator.for_model(policy.processor, policy.config.vision, BUCKETS, batch_size)
    for start in range(0, num_examples, batch_size):
        yield collate([[random_example(policy.processor, rng, start + row)] for row in range(batch_size)])


def on_device(batch: Batch) -> dict[str, jax.Array]:
    return jax.tree.map(jnp.asarray, batch.arrays)


def bucket(batch: Batch) -> tuple[int, int]:
    return batch.arrays["tokens"].shape[1], batch.arrays["patches"].shape[1]


def test_three_hundred_random_images_compile_one_forward_pass_per_bucket(policy, measured):
    @jax.jit
    def hidden(states, batch):
        return nnx.merge(policy.graphdef, *states).hidden(batch).sum()

    seen, waste, images = set(), [], 0
    for batch in batches(policy, 230):
        images += sum(len(set(row)) - (0 in row) for row in batch.arrays["patch_segments"].tolist())
        assert np.isfinite(hidden((policy.trainable, policy.frozen), on_device(batch)))
        seen.add(bucket(batch))
        waste.append(batch.waste)
    assert seen == set(BUCKETS.pairs)
    assert images >= 300
    measured("Compiled forward passes per bucket, 300 random images", hidden._cache_size() / len(seen), at_most=1)
    tokens, patches = np.mean(waste, axis=0)
    measured("Share of tokens that are padding, 300 random images in 4 buckets", tokens, at_most=0.6)
    measured("Share of patches that are padding, 300 random images in 4 buckets", patches, at_most=0.65)


def test_fine_tuning_compiles_one_gradient_per_bucket(policy, gradients, measured):
    seen = set()
    for batch in batches(policy, 40):
        _, sums = gradients(None, policy.trainable, policy.frozen, on_device(batch), jax.random.key(0))
        assert np.isfinite(sums.nll)
        seen.add(bucket(batch))
    assert len(seen) > 1
    measured("Compiled gradients per bucket, 40 random examples", gradients._cache_size() / len(seen), at_most=1)


def test_a_vision_tower_that_runs_on_padding_alone_changes_nothing(policy, gradients, measured):
    encoded, loss_mask = policy.processor.encode_example([{"role": "user", "content": "Where is it?"}], "left")
    row = [Example(*encoded[:2], loss_mask, (), 0)]

    def sums_and_gradients(patches):
        buckets = BucketsConfig(tokens=(128,), patches=(patches,))
        batch = Collator.for_model(policy.processor, policy.config.vision, buckets, 2)([row])
        assert bucket(batch) == (128, patches)
        found, sums = gradients(None, policy.trainable, policy.frozen, on_device(batch), jax.random.key(0))
        return sums, dict(nnx.to_flat_state(found))

    (sums, without), (padded_sums, with_padding) = sums_and_gradients(0), sums_and_gradients(96)
    np.testing.assert_allclose(padded_sums.nll, sums.nll, rtol=1e-6)
    worst = 0.0
    for path, expected in without.items():
        difference, scale = np.abs(with_padding[path][...] - expected[...]).max(), np.abs(expected[...]).max()
        assert difference == 0 if path[0] == "vision" else scale > 0, path
        worst = max(worst, difference / max(scale, 1e-30))
    measured("Gradients of text with the vision tower on padding against without it, relative", worst, at_most=1e-5)
