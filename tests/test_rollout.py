"""Sampling on the device: the cache, the shared prompt, keys, and what a sampler must never do."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import sif_jax
from sif_jax.config import BucketsConfig
from sif_jax.data.batch import Collator
from sif_jax.data.example import Example
from sif_jax.errors import InputError
from sif_jax.rollout.engine import encode_images, generate
from sif_jax.rollout.sampling import Sampling, choose, sample_keys
from sif_jax.training.policy import completion_logprobs
from tests.checkpoints import tiny_checkpoint, torch_model
from tests.test_model_parity import MESSAGES, torch_inputs

NAMES = ["two images", "text", "one image"]
LENGTH = 70  # longer than the first cache


@pytest.fixture(scope="module")
def vlm():
    return sif_jax.load(tiny_checkpoint())


def prompts(vlm, names):
    examples = [
        Example(*encoded[:2], np.zeros(len(encoded.tokens), np.float32), encoded.images, index)
        for index, encoded in enumerate(vlm.encode(MESSAGES[name]) for name in names)
    ]
    buckets = BucketsConfig(tokens=(128,), patches=(256,))
    return Collator.for_model(vlm.processor, vlm.config.vision, buckets, len(names))([[x] for x in examples]).arrays


def rollout_of(vlm, names=NAMES, ids=None, samples=3, step=0, **changed):
    sampling = Sampling(**{"max_new_tokens": LENGTH, "stop_ids": vlm.processor.eos_ids} | changed)
    batch = prompts(vlm, names)
    keys = sample_keys(7, step, np.arange(len(names)) if ids is None else ids, samples)
    features = encode_images(vlm.graphdef, (vlm.state,), batch)
    return batch, features, generate(vlm.graphdef, (vlm.state,), batch, features, keys, sampling=sampling, pad_id=0)


def test_returned_logprobs_are_those_of_the_trainer_and_of_a_full_forward(vlm):
    batch, features, rollout = rollout_of(vlm, temperature=0.8)
    mask = np.arange(LENGTH) < np.asarray(rollout.lengths)[..., None]
    model = nnx.merge(vlm.graphdef, vlm.state)
    score = jax.jit(lambda batch, features, ids: completion_logprobs(model, batch, features, ids, temperature=0.8)[0])
    trainer = np.asarray(score(batch, features, rollout.ids))
    np.testing.assert_allclose(np.asarray(rollout.logprobs)[mask], trainer[mask], atol=1e-5)
    assert (np.asarray(rollout.logprobs)[~mask] == 0).all()

    row, sample = 0, 1
    ids = np.asarray(rollout.ids)[row, sample, : int(rollout.lengths[row, sample])]
    inputs = vlm.encode(MESSAGES[NAMES[row]])
    full = vlm.logprobs(inputs, ids)
    at_temperature_1 = np.asarray(
        jax.jit(lambda b, f, i: completion_logprobs(model, b, f, i, temperature=1.0)[0])(batch, features, rollout.ids)
    )[row, sample, : len(ids)]
    np.testing.assert_allclose(full, at_temperature_1, atol=1e-5)


@pytest.mark.parametrize("name", MESSAGES)
def test_cached_steps_equal_the_full_forward(vlm, name, measured):
    forbidden = vlm.processor.forbidden_ids(vlm.config.text.vocab_size)
    _, _, rollout = rollout_of(vlm, [name], samples=2, temperature=1.0, forbidden_ids=forbidden)
    errors = []
    for ids, logprobs, length in zip(*(np.asarray(x)[0] for x in rollout[:3]), strict=True):
        full = vlm.logprobs(vlm.encode(MESSAGES[name]), ids[:length])
        errors.append(np.abs(logprobs[:length] - full).max())
    measured(f"log-probs of cached decoding against the full forward, {name}, nats", max(errors), at_most=1e-5)


def test_greedy_tokens_equal_transformers_generate(vlm):
    _, _, rollout = rollout_of(vlm, samples=1, temperature=0.0)
    for row, name in enumerate(NAMES):
        inputs = torch_inputs(vlm.encode(MESSAGES[name]))
        theirs = torch_model(tiny_checkpoint()).generate(
            **inputs, max_new_tokens=LENGTH, do_sample=False, eos_token_id=list(vlm.processor.eos_ids), pad_token_id=0
        )[0, inputs["input_ids"].shape[1] :]
        ours = np.asarray(rollout.ids)[row, 0, : int(rollout.lengths[row, 0])]
        np.testing.assert_array_equal(ours, theirs.numpy())


def test_a_sample_is_the_same_whatever_shares_its_batch_and_differs_between_steps_and_samples(vlm):
    _, _, together = rollout_of(vlm)
    _, _, alone = rollout_of(vlm, names=["one image"], ids=np.array([2]))
    np.testing.assert_array_equal(together.ids[2], alone.ids[0])
    _, _, later = rollout_of(vlm, step=1)
    assert (np.asarray(later.ids) != np.asarray(together.ids)).any(axis=-1).all()
    assert (np.asarray(together.ids)[:, 0] != np.asarray(together.ids)[:, 1]).any(axis=-1).all()


def test_a_sample_ends_at_its_stop_token_and_is_padded_after_it(vlm):
    stop = tuple(range(7, 60))
    _, _, rollout = rollout_of(vlm, stop_ids=stop, temperature=1.0)
    ids, lengths = np.asarray(rollout.ids), np.asarray(rollout.lengths)
    assert rollout.finished.any()
    for row, sample in np.ndindex(lengths.shape):
        end = lengths[row, sample]
        assert np.isin(ids[row, sample, end - 1], stop) == bool(rollout.finished[row, sample])
        assert not np.isin(ids[row, sample, : end - 1], stop).any()
        assert (ids[row, sample, end:] == 0).all()


def test_forbidden_tokens_are_never_drawn_and_logprobs_stay_those_of_the_whole_softmax(vlm):
    logits = jnp.zeros((1, 4)).at[..., 2].set(5.0)
    keys = sample_keys(0, 0, np.zeros(1, np.int32), 1)[0]
    tokens, logprobs = choose(logits, keys, jnp.zeros(1, jnp.int32), Sampling(1, (), (2,), 0.0))
    assert int(tokens[0]) == 0
    np.testing.assert_allclose(logprobs[0], jax.nn.log_softmax(logits[0])[0])
    forbidden = vlm.processor.forbidden_ids(vlm.config.text.vocab_size)
    assert set(range(len(vlm.processor.tokenizer), 320)) < set(forbidden)  # rows of the table that no token has
    assert vlm.processor.ids.image_pad in forbidden
    _, _, rollout = rollout_of(vlm, forbidden_ids=forbidden, temperature=3.0)
    assert not np.isin(np.asarray(rollout.ids), forbidden).any()


@pytest.mark.parametrize(
    ("settings", "kept"), [({"top_k": 2}, {0, 1}), ({"top_p": 0.6}, {0, 1}), ({"top_p": 0.4}, {0}), ({}, {0, 1, 2, 3})]
)
def test_truncated_sampling_draws_from_the_head_of_the_distribution_only(settings, kept):
    logits = jnp.broadcast_to(jnp.log(jnp.array([0.5, 0.3, 0.15, 0.05])), (400, 4))
    keys = sample_keys(1, 0, np.zeros(1, np.int32), 400)[0]
    tokens, _ = choose(logits, keys, jnp.zeros(400, jnp.int32), Sampling(1, (), **settings))
    assert set(np.asarray(tokens).ravel().tolist()) == kept


@pytest.mark.parametrize("settings", [{"max_new_tokens": 0}, {"temperature": -1.0}, {"top_p": 0.0}])
def test_impossible_sampling_is_refused_before_any_device_work(settings):
    with pytest.raises(InputError):
        Sampling(**{"max_new_tokens": 1, "stop_ids": ()} | settings)


def test_the_public_generate_returns_texts_ids_logprobs_and_the_reason_to_stop(vlm):
    messages = MESSAGES["one image"]
    one, two = vlm.generate(messages, max_new_tokens=5, num_samples=2, temperature=1.0, seed=3)
    assert (one, two) == tuple(vlm.generate(messages, max_new_tokens=5, num_samples=2, temperature=1.0, seed=3))
    assert one.ids != two.ids
    assert one.text == vlm.processor.decode(one.ids)
    np.testing.assert_allclose(one.logprobs, vlm.logprobs(vlm.encode(messages), one.ids), atol=1e-5)
    assert one.finish_reason == ("stop" if one.ids[-1] in vlm.processor.eos_ids else "length")
    with pytest.raises(InputError, match="num_samples"):
        vlm.generate(messages, num_samples=0)
