"""No array of [rows, tokens, vocabulary] exists in a compiled training step or rollout, in any type, order or reshaping."""

import re
from math import prod

import jax
import jax.numpy as jnp
import numpy as np

from sif_jax.bench.workload import abstract_policy, random_batch
from sif_jax.config import GrpoConfig
from sif_jax.models.qwen2_5_vl.config import Qwen2_5_VLConfig
from sif_jax.rollout.engine import encode_images, generate
from sif_jax.rollout.sampling import Sampling, sample_keys
from sif_jax.training import grpo, sft
from sif_jax.training.reference import reference_logprobs
from tests.architectures import tiny_architecture

ROWS, TOKENS, VOCAB = 2, 512, 32768
SAMPLES, COMPLETION = 2, 256
WHOLE = ROWS * TOKENS * VOCAB  # elements; also prompts x samples x completion x vocabulary
IMAGE_PX = (112, 84)
ARRAY = re.compile(r"\b(?:pred|bf16|[suf]\d+|c\d+|f8\w+)\[([\d,]+)\]")


def architecture() -> Qwen2_5_VLConfig:
    return tiny_architecture(vocab_size=VOCAB)


def largest_array(compiled) -> int:
    """Elements of the largest array that the program mentions, inside fusions too."""
    return max(prod(map(int, shape.split(","))) for shape in ARRAY.findall(compiled.as_text()))


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
    reference = reference_logprobs.lower(graphdef, (trainable, frozen), batch(), features, ids, temperature=1.0)
    assert_no_whole_logits(reference.compile(), "log-probabilities of the reference", measured)


def encode_images_of(graphdef):
    return lambda states, batch: encode_images(graphdef, states, batch)


def test_a_rollout_never_holds_all_logits(measured):
    graphdef, *states = abstract_policy(architecture())
    states, prompts = tuple(states), batch()
    features = jax.eval_shape(encode_images_of(graphdef), states, prompts)
    keys = jax.eval_shape(lambda: sample_keys(0, 0, np.arange(ROWS), SAMPLES))
    sampling = Sampling(max_new_tokens=COMPLETION, stop_ids=(1,), forbidden_ids=(2, 3), top_k=20, top_p=0.9)
    program = generate.lower(graphdef, states, prompts, features, keys, sampling=sampling, pad_id=0)
    assert_no_whole_logits(program.compile(), "rollout", measured)


def test_the_check_finds_the_logits_of_a_naive_cross_entropy(monkeypatch):
    def naive(hidden, head, targets):
        logprobs = jax.nn.log_softmax(hidden @ head)
        return jnp.take_along_axis(logprobs, targets[:, None], axis=-1)[:, 0], -(jnp.exp(logprobs) * logprobs).sum(-1)

    monkeypatch.setattr("sif_jax.training.policy.chunked_logprobs", naive)
    array, temporaries = shares(compiled_sft_step())
    assert array > 0.99  # the last token of a row predicts nothing
    assert temporaries > 0.99
