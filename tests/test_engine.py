"""The rollout engine: few rows, several lanes, stacked or separate layers give the same samples, and nothing stays behind."""

import jax
import numpy as np
import pytest
import torch
from transformers.generation.logits_process import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

import sif_jax
from sif_jax.errors import InputError
from sif_jax.rollout import programs
from sif_jax.rollout.engine import Prompts, generate, make_slots, split_prompts, stream
from sif_jax.rollout.sampling import Sampling, _truncate, sample_keys
from sif_jax.rollout.schedule import Usage
from sif_jax.rollout.stops import before_stop, first_stop
from tests.checkpoints import tiny_checkpoint
from tests.test_model_parity import MESSAGES
from tests.test_rollout import NAMES, prompts

LENGTH, SAMPLES = 70, 4
LIMITS = np.array([[70, 3, 33, 1], [5, 64, 20, 41], [12, 2, 68, 30]], np.int32)


@pytest.fixture(scope="module")
def vlm():
    return sif_jax.load(tiny_checkpoint())


@pytest.fixture(scope="module")
def inputs(vlm):
    batch = prompts(vlm, NAMES)
    keys = sample_keys(7, 0, np.arange(len(NAMES)), SAMPLES)
    return batch, programs.encode_images(vlm.graphdef, (vlm.state,), batch), keys


def sampling(vlm, **changed):
    forbidden = vlm.processor.forbidden_ids(vlm.config.text.vocab_size)
    return Sampling(**{"max_new_tokens": LENGTH, "stop_ids": (), "forbidden_ids": forbidden} | changed)


@pytest.fixture(scope="module")
def whole(vlm, inputs):
    """Every sample in a row of its own."""
    return generate(vlm.graphdef, (vlm.state,), *inputs, sampling=sampling(vlm), pad_id=0, limits=LIMITS)


def assert_same(one, other):
    np.testing.assert_array_equal(one.ids, other.ids)
    np.testing.assert_array_equal(one.lengths, other.lengths)
    np.testing.assert_array_equal(one.finished, other.finished)
    np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-5)


def test_each_completion_ends_at_its_own_limit(whole):
    np.testing.assert_array_equal(whole.lengths, LIMITS)
    assert not np.asarray(whole.finished).any()


@pytest.mark.parametrize("rows", [3, 5])
def test_samples_that_wait_for_a_row_are_those_that_need_not_wait(vlm, inputs, whole, rows):
    usage = Usage()
    refilled = generate(
        vlm.graphdef,
        (vlm.state,),
        *inputs,
        sampling=sampling(vlm),
        pad_id=0,
        limits=LIMITS,
        rows=rows,
        prefill=1,
        usage=usage,
    )
    assert_same(refilled, whole)
    assert usage.tokens == LIMITS.sum()
    assert usage.prompts == len(NAMES)


@pytest.mark.parametrize("separate", [True, False])
def test_stacked_and_separate_layers_give_the_same_samples(vlm, inputs, whole, separate):
    batch, features, keys = inputs
    whole_unit = Prompts(batch, features, np.arange(3), np.asarray(jax.random.key_data(keys)), LIMITS)
    slots = make_slots(sampling(vlm), prompts=3, samples=SAMPLES, rows=6, prefill=1)
    ended = list(
        stream(
            vlm.graphdef,
            (vlm.state,),
            split_prompts(whole_unit, 1),
            sampling=sampling(vlm),
            slots=slots,
            separate=separate,
        )
    )
    assert len(ended) == LIMITS.size
    for task in ended:
        assert task.ids == np.asarray(whole.ids)[task.prompt, task.sample, : len(task.ids)].tolist()


def test_prompts_of_several_lengths_may_follow_each_other(vlm, whole, inputs):
    def unit(name, tokens):
        from sif_jax.config import BucketsConfig
        from sif_jax.data.batch import Collator
        from sif_jax.data.example import Example

        encoded = vlm.encode(MESSAGES[name])
        example = Example(*encoded[:2], np.zeros(len(encoded.tokens), np.float32), encoded.images, 0)
        buckets = BucketsConfig(tokens=(tokens,), patches=(256,))
        batch = Collator.for_model(vlm.processor, vlm.config.vision, buckets, 1)([[example]]).arrays
        number = NAMES.index(name)
        keys = np.asarray(jax.random.key_data(inputs[2]))[number : number + 1]
        features = programs.encode_images(vlm.graphdef, (vlm.state,), batch)
        return Prompts(batch, features, np.array([number]), keys, LIMITS[number : number + 1])

    units = [unit("text", 64), unit("one image", 96), unit("two images", 128)]
    slots = make_slots(sampling(vlm), prompts=3, samples=SAMPLES, rows=5, prefill=1)
    for task in stream(vlm.graphdef, (vlm.state,), units, sampling=sampling(vlm), slots=slots):
        assert task.ids == np.asarray(whole.ids)[task.prompt, task.sample, : len(task.ids)].tolist()


def test_keys_and_values_are_freed_when_a_rollout_ends_or_is_left(vlm, inputs):
    batch, features, keys = inputs

    def held():
        return sum(x.nbytes for x in jax.live_arrays() if x.ndim >= 4)

    before = held()
    rollout = generate(vlm.graphdef, (vlm.state,), *inputs, sampling=sampling(vlm), pad_id=0, limits=LIMITS)
    assert held() == before
    unit = Prompts(batch, features, np.arange(3), np.asarray(jax.random.key_data(keys)), LIMITS)
    slots = make_slots(sampling(vlm), prompts=3, samples=SAMPLES, prefill=3)
    left = stream(vlm.graphdef, (vlm.state,), [unit], sampling=sampling(vlm), slots=slots)
    next(left)
    assert held() > before, "a rollout under way holds its keys and values"
    left.close()
    assert held() == before
    del rollout


def test_logprobs_are_those_of_the_whole_softmax_under_every_truncation(vlm, inputs):
    settings = sampling(vlm, temperature=0.9, top_k=12, top_p=0.9, min_p=0.02)
    out = generate(vlm.graphdef, (vlm.state,), *inputs, sampling=settings, pad_id=0, limits=LIMITS)
    row, sample = 1, 1
    ids = np.asarray(out.ids)[row, sample, : LIMITS[row, sample]]
    encoded = vlm.encode(MESSAGES[NAMES[row]])
    logits = vlm.logits(sif_jax.api._continue(encoded, ids))[len(encoded.tokens) - 1 : -1] / 0.9
    expected = np.asarray(jax.nn.log_softmax(logits))[np.arange(len(ids)), ids]
    np.testing.assert_allclose(np.asarray(out.logprobs)[row, sample, : len(ids)], expected, atol=1e-5)


@pytest.mark.parametrize(
    "settings", [{"top_k": 5}, {"top_p": 0.7}, {"min_p": 0.1}, {"top_k": 9, "top_p": 0.8, "min_p": 0.2}]
)
def test_truncation_keeps_the_tokens_that_transformers_keeps(settings):
    logits = np.random.default_rng(3).normal(size=(50, 40)).astype(np.float32) * 2
    ours = _truncate(jax.numpy.asarray(logits), Sampling(1, (), **settings))
    theirs = torch.tensor(logits)
    for name, warper in (("top_k", TopKLogitsWarper), ("top_p", TopPLogitsWarper), ("min_p", MinPLogitsWarper)):
        if name in settings:
            theirs = warper(settings[name])(None, theirs)
    np.testing.assert_array_equal(np.isfinite(ours), np.isfinite(theirs.numpy()))


def text_of(ids):
    """A vocabulary of letters; 0 is a token of two bytes that spell one letter only together with 1."""
    return "".join({0: "ab", 1: "c"}.get(i, chr(i)) for i in ids)


@pytest.mark.parametrize(
    ("text", "stop", "kept"),
    [("xyz</a>", ["</a>"], 7), ("xyz</a>!!", ["</a>"], 7), ("xyz", ["</a>"], None), ("endend", ["nd", "end"], 3)],
)
def test_a_stop_string_ends_a_completion_at_the_token_that_completes_it(text, stop, kept):
    ids = [ord(letter) for letter in text]
    assert first_stop(ids, len(ids), stop, text_of) == kept


def test_a_stop_string_may_begin_in_tokens_that_were_there_before_and_end_within_a_token():
    assert first_stop([ord("x"), 0, 1, ord("y")], 2, ["abc"], text_of) == 3
    assert first_stop([ord("x"), 0, 1], 2, ["xa"], text_of) == 2
    assert before_stop("xabc", ["xa", "c"]) == ""
    assert before_stop("xabc", ["d"]) == "xabc"


def test_stop_strings_end_samples_in_the_engine_and_leave_the_text(vlm):
    asked = {"max_new_tokens": 60, "num_samples": 3, "temperature": 1.0, "seed": 1}
    free = vlm.generate(MESSAGES["one image"], **asked)
    words = [completion.text[5:7] for completion in free]
    ended = vlm.generate(MESSAGES["one image"], stop=words, **asked)
    for one, other in zip(free, ended):
        assert other.ids == one.ids[: len(other.ids)]
        assert other.finish_reason == "stop"
        assert len(other.ids) < len(one.ids)
        assert other.text == before_stop(one.text, words)
        assert not any(word in vlm.processor.decode(other.ids[:-1]) for word in words)


def test_further_stop_ids_end_a_sample(vlm):
    (free,) = vlm.generate(MESSAGES["text"], max_new_tokens=20)
    (ended,) = vlm.generate(MESSAGES["text"], max_new_tokens=20, stop_ids=free.ids[3:4])
    assert ended.ids == free.ids[: free.ids.index(free.ids[3]) + 1]
    assert ended.finish_reason == "stop"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_length": 10}, "the prompt is longer than the cache; got '.* prompt tokens, 0 of them images"),
        ({"max_length": 64, "max_new_tokens": 39}, "no room for so many new tokens.*fix: set max_new_tokens=3 or less"),
        ({"max_new_tokens": 0}, "no room for a token"),
        ({"num_samples": 0}, "nothing to sample"),
        ({"min_p": 2.0}, "min_p out of range"),
        ({"top_k": -1}, "top_k out of range"),
        ({"temperature": float("nan")}, "negative temperature"),
        ({"stop": [""]}, "not a list of stop strings"),
    ],
)
def test_what_cannot_be_sampled_is_refused_before_any_device_work(vlm, monkeypatch, settings, message):
    monkeypatch.setattr("sif_jax.api.encode_images", None)
    with pytest.raises(InputError, match=message):
        vlm.generate(MESSAGES["text"], **{"max_new_tokens": 4} | settings)


def test_an_image_with_more_tokens_than_the_sequence_is_named(vlm, monkeypatch):
    monkeypatch.setattr("sif_jax.api.encode_images", None)
    with pytest.raises(
        InputError, match=r"image 1 has more tokens than the sequence; got \d+; expected fewer than max_length=4"
    ):
        vlm.generate(MESSAGES["one image"], max_new_tokens=1, max_length=4)


def test_stop_strings_without_a_way_to_the_text_are_refused(vlm, inputs):
    with pytest.raises(InputError, match="stop strings need the text"):
        generate(vlm.graphdef, (vlm.state,), *inputs, sampling=sampling(vlm, stop=("x",)), pad_id=0)
