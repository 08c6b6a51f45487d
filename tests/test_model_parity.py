"""Qwen2.5-VL against transformers on a tiny random float32 checkpoint.

Logits agree within 1e-4 of the largest logit: both sides compute in float32, in another order of summation.
"""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

import sif_jax
from sif_jax.config import BucketsConfig
from sif_jax.data.batch import Collator
from sif_jax.data.example import Example
from sif_jax.models.qwen2_5_vl.names import checkpoint_tensors, hub_name
from sif_jax.models.qwen2_5_vl.weights import load_model
from sif_jax.training.policy import next_token_loss
from tests.attention_backends import RUNNABLE, traced_as
from tests.checkpoints import tiny_checkpoint, torch_model

RNG = np.random.default_rng(0)
# (width, height); 84 x 140 and 112 x 196 are not multiples of the 56-pixel window.
IMAGES = [RNG.integers(0, 256, (height, width, 3), np.uint8) for width, height in [(84, 140), (196, 112), (56, 56)]]


def user(*parts: object) -> list[dict]:
    content = [
        {"type": "text", "text": part} if isinstance(part, str) else {"type": "image", "image": part} for part in parts
    ]
    return [{"role": "user", "content": content}]


MESSAGES = {
    "text": user("Where is the red cube?"),
    "one image": user(IMAGES[0], "Where is it?"),
    "two images": user("Original image: ", IMAGES[0], "\nDepth image: ", IMAGES[1], "\nIs it left?"),
    "three images": user(IMAGES[2], IMAGES[1], "and", IMAGES[0]),
}


def torch_inputs(encoded) -> dict[str, torch.Tensor]:
    """What transformers' processor would pass for one conversation."""
    tokens = torch.tensor(encoded.tokens[None]).long()
    image_id = torch_model(tiny_checkpoint()).config.image_token_id
    inputs = {"input_ids": tokens, "mm_token_type_ids": (tokens == image_id).int()}
    if encoded.images:
        inputs["pixel_values"] = torch.tensor(np.concatenate([image.patches for image in encoded.images]))
        inputs["image_grid_thw"] = torch.tensor([[1, *image.grid_hw] for image in encoded.images])
    return inputs


def torch_logits(encoded, *, tied: bool = False) -> np.ndarray:
    with torch.no_grad():
        return torch_model(tiny_checkpoint(tied=tied))(**torch_inputs(encoded)).logits[0].numpy()


def relative_error(ours, theirs) -> float:
    """The largest difference, relative to the largest value of theirs."""
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


@pytest.mark.parametrize("name", MESSAGES)
def test_logits_equal_transformers(name, measured):
    vlm = sif_jax.load(tiny_checkpoint())
    encoded = vlm.encode(MESSAGES[name])
    measured(f"logits, {name}", relative_error(vlm.logits(encoded), torch_logits(encoded)), at_most=1e-4)


def test_a_tied_head_equals_transformers(measured):
    vlm = sif_jax.load(tiny_checkpoint(tied=True))
    encoded = vlm.encode(MESSAGES["one image"])
    measured("logits, tied head", relative_error(vlm.logits(encoded), torch_logits(encoded, tied=True)), at_most=1e-4)


def batch_of(vlm, names, *, packed=False) -> dict[str, np.ndarray]:
    examples = []
    for index, name in enumerate(names):
        encoded = vlm.encode(MESSAGES[name])
        mask = (np.arange(len(encoded.tokens)) > len(encoded.tokens) - 6).astype(np.float32)
        examples.append(Example(*encoded[:2], mask, encoded.images, index))
    rows = [examples] if packed else [[example] for example in examples]
    buckets = BucketsConfig(tokens=(512,) if packed else (128,), patches=(512,) if packed else (256,))
    return Collator.for_model(vlm.processor, vlm.config.vision, buckets, len(rows))(rows).arrays


NAMES = ["two images", "text", "three images", "one image"]


@cache
def compiled_logits(attention, packed):
    """(a mixed batch, the function that gives its logits)."""
    batch = batch_of(sif_jax.load(tiny_checkpoint()), NAMES, packed=packed)
    dtype = "bfloat16" if attention == "cudnn" else "float32"  # all that cuDNN takes
    model = load_model(tiny_checkpoint(), dtype=dtype, attention=attention.split()[0])
    with traced_as(attention):
        return batch, jax.jit(lambda batch: model.logits(model.hidden(batch))).lower(batch).compile()


@pytest.mark.parametrize("attention", RUNNABLE)
def test_packed_examples_have_the_logits_they_have_alone(attention, measured):
    batch, compiled = compiled_logits(attention, True)
    logits = np.asarray(compiled(batch))[0]
    errors = [error(logits[batch["segments"][0] == number], name) for number, name in enumerate(NAMES, 1)]
    tolerance = 0.1 if attention == "cudnn" else 1e-4
    measured(f"logits of packed examples against transformers alone, {attention}", max(errors), at_most=tolerance)


def test_examples_of_a_batch_have_the_logits_they_have_alone(measured):
    batch, compiled = compiled_logits("xla", False)
    logits = np.asarray(compiled(batch))
    errors = [error(logits[row][batch["segments"][row] == 1], name) for row, name in enumerate(NAMES)]
    measured("logits of examples padded in a batch against transformers alone", max(errors), at_most=1e-4)


def error(logits, name):
    """The largest difference from what transformers gives the conversation alone, relative to the largest logit."""
    return relative_error(logits, torch_logits(sif_jax.load(tiny_checkpoint()).encode(MESSAGES[name])))


@pytest.mark.parametrize("attention", RUNNABLE)
def test_nothing_of_a_packed_example_reaches_the_others(attention):
    batch, compiled = compiled_logits(attention, True)
    mine = batch["segments"][0] == 1
    tokens, patches = batch["tokens"].copy(), batch["patches"].copy()
    tokens[0, np.flatnonzero(mine)[0]] += 1
    patches[batch["patch_segments"] == 1] *= -1.0  # the first image of the first example
    before, after = (
        np.asarray(compiled(inputs))[0] for inputs in (batch, batch | {"tokens": tokens, "patches": patches})
    )
    assert (before[mine] != after[mine]).any(axis=-1).all()
    np.testing.assert_array_equal(before[~mine], after[~mine])


@pytest.mark.parametrize(
    ("remat", "attention"),
    [("none", "xla"), ("full", "xla"), ("dots", "flash"), pytest.param("full", "splash", marks=pytest.mark.slow)],
)
def test_loss_and_every_gradient_equal_torch_through_the_vision_tower(remat, attention, measured):
    vlm = sif_jax.load(tiny_checkpoint())
    batch = jax.tree.map(jnp.asarray, batch_of(vlm, ["two images", "text", "one image"]))
    model = load_model(tiny_checkpoint(), remat=remat, attention=attention)
    graphdef, state = nnx.split(model)
    loss, gradients = jax.value_and_grad(lambda state: next_token_loss(nnx.merge(graphdef, state), batch, None)[0])(
        state
    )

    reference = torch_model(tiny_checkpoint())
    reference.zero_grad()
    total = torch.zeros(())
    for name in ["two images", "text", "one image"]:
        inputs = torch_inputs(vlm.encode(MESSAGES[name]))
        logprobs = torch.log_softmax(reference(**inputs).logits[0, :-1], dim=-1)
        total = total - logprobs.gather(1, inputs["input_ids"][0, 1:, None])[-5:].sum()
    total.backward()
    where = f"remat {remat}, {attention} attention"
    measured(f"loss, {where}", abs(float(loss) / total.item() - 1), at_most=1e-5)

    theirs = {hub_name(name): p.grad for name, p in reference.named_parameters()}
    errors = {}
    for path, tensor in checkpoint_tensors(vlm.config, state).items():
        ours = np.asarray(dict(nnx.to_flat_state(gradients))[path][...])
        for layer, name in enumerate(tensor.names):
            gradient = tensor.to_theirs(ours[layer] if tensor.stacked else ours)
            expected = theirs[name].numpy()
            errors[name] = np.abs(gradient - expected).max() / max(np.abs(expected).max(), 1e-3)
    assert max(errors.values()) <= 1e-4, max(errors, key=errors.__getitem__)
    measured(f"gradient of the worst weight, {where}", max(errors.values()), at_most=1e-4)
