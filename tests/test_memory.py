"""No array of [rows, tokens, vocabulary] exists in a compiled training step or rollout, in any type, order or reshaping."""

import re
from functools import partial
from math import prod

import jax
import jax.numpy as jnp
import pytest

from sif_jax.bench.workload import abstract_policy, random_batch
from sif_jax.config import GrpoConfig
from sif_jax.models.qwen2_5_vl.config import Qwen2_5_VLConfig
from sif_jax.models.qwen2_5_vl.layer_arrays import separate_layers
from sif_jax.ops.attention import attention
from sif_jax.rollout import programs
from sif_jax.rollout.engine import encode_images, make_slots
from sif_jax.rollout.sampling import Sampling
from sif_jax.rollout.schedule import empty_rows
from sif_jax.training import grpo, sft
from sif_jax.training.reference import reference_logprobs
from tests.architectures import tiny_architecture

ROWS, TOKENS, VOCAB = 2, 512, 32768
SAMPLES, COMPLETION = 2, 256
GROUP, RING = 6, 64
WHOLE = ROWS * TOKENS * VOCAB  # elements; also prompts x samples x completion x vocabulary
IMAGE_PX = (112, 84)
ARRAY = re.compile(r"\b(?:pred|bf16|[suf]\d+|c\d+|f8\w+)\[([\d,]+)\]")


def architecture() -> Qwen2_5_VLConfig:
    return tiny_architecture(vocab_size=VOCAB)


def largest_array(compiled) -> int:
    """Elements of the largest array that the program mentions, inside fusions too."""
    return max(map(prod, shapes_in(compiled)))


def shapes_in(compiled) -> set[tuple[int, ...]]:
    return {tuple(map(int, shape.split(","))) for shape in ARRAY.findall(compiled.as_text())}


def shares(compiled) -> tuple[float, float]:
    """Of all logits: the largest array in elements, the temporaries in bytes of float32."""
    return largest_array(compiled) / WHOLE, compiled.memory_analysis().temp_size_in_bytes / (4 * WHOLE)


def assert_no_whole_logits(compiled, name, measured):
    array, temporaries = shares(compiled)
    measured(f"{name}: largest array, share of [rows, tokens, vocab]", array, at_most=0.25)
    measured(f"{name}: temporaries, share of float32 [rows, tokens, vocab]", temporaries, at_most=0.6)


def batch():
    return random_batch(architecture(), rows=ROWS, tokens=TOKENS, image_px=IMAGE_PX)


def key():
    return jax.eval_shape(lambda: jax.random.key(0))


def compiled_sft_step(**settings):
    graphdef, trainable, frozen = abstract_policy(architecture(), **settings)
    return sft.make_gradients(graphdef, dropout=False).lower(None, trainable, frozen, batch(), key()).compile()


def test_an_sft_step_never_holds_all_logits(measured):
    assert_no_whole_logits(compiled_sft_step(), "SFT step with LoRA", measured)


def test_a_full_fine_tune_never_holds_all_logits(measured):
    program = compiled_sft_step(lora_rank=None, remat="full")
    assert_no_whole_logits(program, "SFT step of every weight, remat full", measured)


def test_a_grpo_step_never_holds_all_logits(measured):
    graphdef, trainable, frozen = abstract_policy(architecture())
    settings = GrpoConfig.model_validate(
        {
            "run": {"name": "x"},
            "model": {"path": "x"},
            "lora": {"rank": 8},
            "data": {"path": "x"},
            "optimizer": {"learning_rate": 1e-4},
        }
    )
    tokens = jax.ShapeDtypeStruct((ROWS, SAMPLES, COMPLETION), jnp.float32)
    each = jax.ShapeDtypeStruct((ROWS, SAMPLES), jnp.float32)
    features = jax.eval_shape(encode_images_of(graphdef), (trainable, frozen), batch())
    ids, mask = tokens.update(dtype=jnp.int32), tokens.update(dtype=jnp.bool_)
    groups = grpo.Groups(
        grpo.Completions(batch(), features, ids, tokens, mask), tokens, each, each.update(dtype=jnp.bool_)
    )
    program = grpo.make_gradients(graphdef, settings).lower(None, trainable, frozen, groups, key())
    assert_no_whole_logits(program.compile(), "GRPO step", measured)
    reference = reference_logprobs.lower(graphdef, (trainable, frozen), batch(), features, ids, mask, temperature=1.0)
    assert_no_whole_logits(reference.compile(), "log-probabilities of the reference", measured)


def encode_images_of(graphdef):
    return lambda states, batch: encode_images(graphdef, states, batch)


def compiled_decode(*, separate: bool):
    graphdef, *states = abstract_policy(architecture())
    states = tuple(states)
    shapes = {"config": architecture().text, "dtype": jnp.float32, "separate": separate}
    pool = jax.eval_shape(partial(programs.empty_pool, slots=ROWS, length=TOKENS, **shapes))
    cache = jax.eval_shape(partial(programs.empty_cache, rows=ROWS * GROUP, length=RING, **shapes))
    layers = jax.eval_shape(separate_layers, states) if separate else None
    sampling = Sampling(max_new_tokens=COMPLETION, stop_ids=(1,), forbidden_ids=(2, 3), top_k=20, top_p=0.9)
    slots = make_slots(sampling, prompts=ROWS, samples=GROUP)
    rows = empty_rows(slots, slots.rows)
    program = programs.decode.lower(
        graphdef, states, layers, pool, cache, jnp.int32(0), rows, sampling=sampling, max_steps=16
    )
    return program.compile()


def repeated_prompts(compiled) -> list[tuple[int, ...]]:
    """Arrays with the prompts' keys or values once per sample, in any order of axes."""
    text = architecture().text
    held = ROWS * text.num_key_value_heads * TOKENS * text.head_dim
    found = [dims for dims in shapes_in(compiled) if TOKENS in dims and text.head_dim in dims]
    assert any(prod(dims) in (held, held * text.num_hidden_layers) for dims in found), "the pool itself"
    return [dims for dims in found if prod(dims) % (GROUP * held) == 0]


@pytest.mark.parametrize("separate", [True, False], ids=["separate layers", "stacked layers"])
def test_decoding_never_holds_all_logits_nor_a_prompt_once_per_sample(measured, separate):
    program = compiled_decode(separate=separate)
    assert_no_whole_logits(program, f"decoding, {'separate' if separate else 'stacked'} layers", measured)
    assert not repeated_prompts(program)


def test_the_check_finds_a_prompt_that_is_repeated_for_its_samples(monkeypatch):
    def naive(q, prefix_k, prefix_v, prefix_mask, k, v, mask, members, place):
        prompt = place[0] // members.shape[2]
        keys, values = (jnp.concatenate([x[prompt], own], axis=2) for x, own in ((prefix_k, k), (prefix_v, v)))
        visible = jnp.concatenate([prefix_mask[prompt], mask], axis=1)
        return attention(q[:, None], keys, values, visible[:, None])[:, 0]

    monkeypatch.setattr("sif_jax.models.qwen2_5_vl.decoder.row_attention", naive)
    jax.clear_caches()
    assert repeated_prompts(compiled_decode(separate=True))
    jax.clear_caches()


def test_computing_prompts_for_a_rollout_never_holds_all_logits(measured):
    graphdef, *states = abstract_policy(architecture())
    states, prompts = tuple(states), batch()
    features = jax.eval_shape(encode_images_of(graphdef), states, prompts)
    pool = jax.eval_shape(partial(programs.empty_pool, architecture().text, ROWS, TOKENS, jnp.float32, separate=True))
    slots = jax.ShapeDtypeStruct((1, ROWS), jnp.int32)
    program = programs.prefill.lower(graphdef, states, pool, prompts, features, slots, spread="prompts")
    assert_no_whole_logits(program.compile(), "computing the prompts", measured)


def test_the_check_finds_the_logits_of_a_naive_cross_entropy(monkeypatch):
    def naive(hidden, head, targets, wanted):
        logprobs = jax.nn.log_softmax(hidden @ head)
        return jnp.take_along_axis(logprobs, targets[:, None], axis=-1)[:, 0], -(jnp.exp(logprobs) * logprobs).sum(-1)

    monkeypatch.setattr("sif_jax.training.policy.chunked_logprobs", naive)
    array, temporaries = shares(compiled_sft_step())
    assert array > 0.99  # the last token of a row predicts nothing
    assert temporaries > 0.99
