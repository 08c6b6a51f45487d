"""Random conversations, images and files against transformers' Qwen2_5_VLProcessor: equal to the last bit (tolerance 0)."""

import dataclasses
from functools import cache
from itertools import cycle, islice

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLModel
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from sif_jax.models.qwen2_5_vl.chat import ChatProcessor
from sif_jax.models.qwen2_5_vl.image_processor import ImageProcessor
from sif_jax.models.qwen2_5_vl.tiny_tokenizer import train_tokenizer, write_tokenizer
from tests.test_chat import OFFICIAL_TEMPLATE, TransformersProcessor
from tests.test_layout import RopeIndexOnly

NUM_CONVERSATIONS = 220
PIXEL_LIMITS = [(56 * 56, 28 * 28 * 1280), (28 * 28, 28 * 28 * 8), (28 * 28 * 4, 28 * 28 * 4), (112 * 112, 262144)]
EXTREME_SIZES = [(1, 1), (1, 200), (200, 1), (2, 400), (500, 3), (28, 28), (27, 29), (41, 42), (14, 1400)]
KINDS = ["RGB", "RGBA", "P", "clear P", "L", "LA", "1", "I;16", "CMYK", "turned"]
EXIF_ORIENTATION = 0x0112
WORDS = ["Where is the red cube?", " 0.125", "12 345", "\n", "\n\n  ", "\t", "don't", "\\u00e9", "a" * 40]
UNICODE = ["naïve", "e\u0301", "東京タワー", "🙂👩‍👧", "ﬁ", "İ", "\u200b", "\u00a0"]
MARKUP = ['<area>[{"bbox_2d":[0.100,1.000],"depth":0.5}]</area>', "<image>", "{{ x }}", "{% if %}", "<tool_call>"]
PIECES = [*WORDS, *UNICODE, *MARKUP, "<|im_end|>", "<|endoftext|>", "<|vision_start|>"]


def random_size(rng):
    if rng.random() < 0.2:
        return EXTREME_SIZES[rng.integers(len(EXTREME_SIZES))]
    longest = int(np.exp(rng.uniform(np.log(5), np.log(600))))
    return tuple(rng.permutation([longest, int(rng.integers(-(-longest // 200), longest + 1))]).tolist())


def picture(rng, kind):
    """A random image of one kind, and what to save it with."""
    width, height = random_size(rng)
    rgba = Image.fromarray(rng.integers(0, 256, (height, width, 4), np.uint8))
    rgb = rgba.convert("RGB")
    if kind == "I;16":
        return Image.fromarray(rng.integers(0, 65536, (height, width), np.uint16)), {}
    if kind == "clear P":
        image = rgb.convert("P")
        image.info["transparency"] = 3
        return image, {"transparency": 3}
    if kind == "turned":
        exif = Image.Exif()
        exif[EXIF_ORIENTATION] = int(rng.integers(1, 9))
        return rgb, {"exif": exif}
    return rgba if kind == "RGBA" else rgb.convert(kind), {}


def images_of_every_kind(rng, directory):
    """Without end: Pillow images of every mode, arrays, and files of every mode and orientation."""
    for number, kind in enumerate(cycle(KINDS)):
        image, options = picture(rng, kind)
        path = directory / f"{number}.{'jpg' if kind in ('CMYK', 'turned') else 'png'}"
        if kind == "turned" or rng.random() < 0.5:
            image.save(path, **options)
            yield str(path)
        elif kind == "RGB" and min(image.size) > 4:  # transformers takes sides of 1, 3 and 4 for channels
            yield np.array(image)
        else:
            yield image


def random_content(rng, images):
    text = "".join(rng.choice(PIECES, rng.integers(1, 7)))
    if rng.random() < 0.25:
        return text
    parts = [{"type": "image", "image": image} for image in islice(images, int(rng.integers(0, 4)))]
    parts += [{"type": "text", "text": text}, {"type": "text", "text": str(rng.choice(PIECES))}]
    return [parts[i] for i in rng.permutation(len(parts))]


def random_conversation(rng, images):
    system = [{"role": "system", "content": "Be brief."}] if rng.random() < 0.4 else []
    turns = [
        {"role": role, "content": random_content(rng, images if role == "user" else iter(()))}
        for role in islice(cycle(["user", "assistant"]), int(rng.integers(1, 5)))
    ]
    return [*system, *turns]


@pytest.fixture(scope="module", params=["the real vocabulary", "a tiny vocabulary"])
def vocabulary(request, tmp_path_factory):
    if request.param == "the real vocabulary":
        return request.param, request.getfixturevalue("shared_data") / "qwen2_5_tokenizer"
    directory = tmp_path_factory.mktemp("tiny")
    write_tokenizer(train_tokenizer(["What is near?", "The ball is near."] * 5, vocab_size=300), directory)
    return request.param, directory


@cache
def processors(directory, limits):
    ours = ChatProcessor.from_directory(directory)
    ours = dataclasses.replace(ours, image_processor=ImageProcessor(*limits))
    sizes = dict(zip(("min_pixels", "max_pixels"), limits))
    tokenizer = AutoTokenizer.from_pretrained(directory)
    return ours, TransformersProcessor(Qwen2VLImageProcessorPil(**sizes), tokenizer, OFFICIAL_TEMPLATE)


def differences(ours, theirs, messages, add_generation_prompt):
    """Which of tokens, grids, patches and positions are not those of transformers."""
    expected = theirs.apply_chat_template(
        messages,
        tokenize=True,
        return_dict=True,
        add_generation_prompt=add_generation_prompt,
        processor_kwargs={"return_tensors": "np"},
    )
    encoded = ours.encode(messages, add_generation_prompt=add_generation_prompt)
    ids = torch.tensor(expected["input_ids"])
    grids = torch.tensor(expected["image_grid_thw"]) if encoded.images else None
    shown = (ids == ours.ids.image_pad).int()
    positions, _ = Qwen2_5_VLModel.get_rope_index(RopeIndexOnly(), ids, shown, grids)
    pairs = {"tokens": (encoded.tokens, ids[0]), "positions": (encoded.positions, positions[:, 0].T)}
    assert ("pixel_values" in expected) == bool(encoded.images)
    if encoded.images:
        patches = np.concatenate([image.patches for image in encoded.images])
        pairs["patches"] = patches.view(np.int32), expected["pixel_values"].view(np.int32)
        pairs["grids"] = [(1, *image.grid_hw) for image in encoded.images], grids
    return {name for name, (mine, reference) in pairs.items() if not np.array_equal(mine, reference)}


def test_random_conversations_are_encoded_as_transformers_does(vocabulary, tmp_path, measured):
    name, directory = vocabulary
    rng = np.random.default_rng(0)
    images = images_of_every_kind(rng, tmp_path)
    wrong = {"tokens": [], "positions": [], "patches": [], "grids": []}
    num_images = 0
    for number in range(NUM_CONVERSATIONS):
        messages = random_conversation(rng, images)
        num_images += sum(
            part["type"] == "image"
            for turn in messages
            if isinstance(turn["content"], list)
            for part in turn["content"]
        )
        ours, theirs = processors(directory, PIXEL_LIMITS[number % len(PIXEL_LIMITS)])
        for what in differences(ours, theirs, messages, add_generation_prompt=bool(number % 3)):
            wrong[what].append(number)
    assert num_images > NUM_CONVERSATIONS
    for what, numbers in wrong.items():
        claim = f"Conversations whose {what} differ from transformers', of {NUM_CONVERSATIONS}, {name}"
        measured(claim, len(numbers), at_most=0)
