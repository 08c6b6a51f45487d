"""Chat encoding against transformers' Qwen2_5_VLProcessor, token for token, on the real vocabulary and on a tiny one."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import AutoTokenizer, Qwen2_5_VLProcessor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.processing_utils import ProcessorMixin

from sif_jax.errors import InputError
from sif_jax.models.qwen2_5_vl.chat import ChatProcessor, messages_with_images
from sif_jax.models.qwen2_5_vl.tiny_tokenizer import train_tokenizer, write_tokenizer

# As published with Qwen2.5-VL.
OFFICIAL_TEMPLATE = (
    "{% set image_count = namespace(value=0) %}{% set video_count = namespace(value=0) %}{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "{% endif %}<|im_start|>{{ message['role'] }}\n{% if message['content'] is string %}{{ message['content'] }}"
    "<|im_end|>\n{% else %}{% for content in message['content'] %}{% if content['type'] == 'image' or 'image' in content "
    "or 'image_url' in content %}{% set image_count.value = image_count.value + 1 %}{% if add_vision_id %}Picture "
    "{{ image_count.value }}: {% endif %}<|vision_start|><|image_pad|><|vision_end|>{% elif content['type'] == 'video' "
    "or 'video' in content %}{% set video_count.value = video_count.value + 1 %}{% if add_vision_id %}Video "
    "{{ video_count.value }}: {% endif %}<|vision_start|><|video_pad|><|vision_end|>{% elif 'text' in content %}"
    "{{ content['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endif %}{% endfor %}{% if add_generation_prompt %}"
    "<|im_start|>assistant\n{% endif %}"
)


class TransformersProcessor(Qwen2_5_VLProcessor):
    """Qwen2_5_VLProcessor without its video processor, which would need torchvision."""

    def __init__(self, image_processor, tokenizer, chat_template=None):
        self.image_token, self.image_token_id = "<|image_pad|>", tokenizer.convert_tokens_to_ids("<|image_pad|>")
        self.video_token, self.video_token_id = "<|video_pad|>", tokenizer.convert_tokens_to_ids("<|video_pad|>")
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)


@pytest.fixture(scope="module")
def tiny_directory(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tiny")
    write_tokenizer(train_tokenizer(["What is near?", "The ball is near."] * 5, vocab_size=300), directory)
    return directory


@pytest.fixture(scope="module")
def tiny(tiny_directory):
    return ChatProcessor.from_directory(tiny_directory)


@pytest.fixture(scope="module", params=["real vocabulary", "tiny vocabulary"])
def directory(request, tiny_directory):
    if request.param == "tiny vocabulary":
        return tiny_directory
    return request.getfixturevalue("shared_data") / "qwen2_5_tokenizer"


def image(width, height):
    values = np.random.default_rng(width).integers(0, 256, (height, width, 3)).astype(np.uint8)
    return Image.fromarray(values)


def picture(width, height):
    return {"type": "image", "image": image(width, height)}


def words(text):
    return {"type": "text", "text": text}


CONVERSATIONS = [
    [{"role": "user", "content": "Bonjour, 1 234.5 naïve 東京  \n\n x"}],
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [picture(84, 56), words("What is near?")]},
    ],
    [{"role": "user", "content": [words("Original: "), picture(84, 56), words("\nDepth: "), picture(84, 56)]}],
    [
        {"role": "user", "content": [picture(100, 60), picture(60, 200), words("{{ not }} <image> jinja {% x %}")]},
        {"role": "assistant", "content": [words("The first one.")]},
        {"role": "user", "content": [words("And this? "), picture(56, 56)]},
    ],
]


@pytest.mark.parametrize("add_generation_prompt", [True, False])
def test_conversations_are_encoded_as_transformers_does(directory, add_generation_prompt):
    ours = ChatProcessor.from_directory(directory)
    theirs = TransformersProcessor(
        Qwen2VLImageProcessorPil(), AutoTokenizer.from_pretrained(directory), OFFICIAL_TEMPLATE
    )
    for messages in CONVERSATIONS:
        expected = theirs.apply_chat_template(
            messages,
            tokenize=True,
            return_dict=True,
            add_generation_prompt=add_generation_prompt,
            processor_kwargs={"return_tensors": "np"},
        )
        encoded = ours.encode(messages, add_generation_prompt=add_generation_prompt)
        assert encoded.tokens.tolist() == expected["input_ids"][0].tolist()
        if encoded.images:
            np.testing.assert_array_equal(np.concatenate([i.patches for i in encoded.images]), expected["pixel_values"])
            assert [(1, *i.grid_hw) for i in encoded.images] == [tuple(g) for g in expected["image_grid_thw"]]


@pytest.mark.parametrize(
    "named", [None, "Qwen2Tokenizer", "Qwen2TokenizerFast", "PreTrainedTokenizerFast", "GPT2Tokenizer"]
)
def test_the_tokenizer_is_the_one_that_autotokenizer_loads(directory, tmp_path, named):
    """Of the class that the directory names, or of the one that AutoTokenizer takes in its place."""
    copy = shutil.copytree(directory, tmp_path / "copy")
    file = copy / "tokenizer_config.json"
    settings = json.loads(file.read_text())
    if named:
        file.write_text(json.dumps(settings | {"tokenizer_class": named}))
    ours, theirs = ChatProcessor.from_directory(copy).tokenizer, AutoTokenizer.from_pretrained(copy)
    assert type(ours) is type(theirs)
    assert ours.backend_tokenizer.to_str() == theirs.backend_tokenizer.to_str()
    assert ours.special_tokens_map == theirs.special_tokens_map


def test_an_image_of_two_by_three_tokens_is_counted_by_hand(tiny):
    encoded = tiny.encode([{"role": "user", "content": [picture(84, 56)]}], add_generation_prompt=False)
    assert (encoded.tokens == tiny.ids.image_pad).sum() == 6
    start = encoded.tokens.tolist().index(tiny.ids.vision_start)
    assert encoded.positions[start : start + 9].tolist() == [
        [start] * 3,
        *([start + 1, start + 1 + h, start + 1 + w] for h in range(2) for w in range(3)),
        [start + 4] * 3,
        [start + 5] * 3,
    ]


def test_an_image_may_be_a_path_an_array_or_a_pil_image(tiny, tmp_path):
    picture = image(56, 56)
    picture.save(tmp_path / "a.png")
    given = [picture, np.asarray(picture), tmp_path / "a.png", str(tmp_path / "a.png")]
    encoded = [tiny.encode([{"role": "user", "content": [{"type": "image", "image": one}]}]) for one in given]
    for other in encoded[1:]:
        np.testing.assert_array_equal(other.images[0].patches, encoded[0].images[0].patches)


def test_placeholders_take_the_images_in_order():
    turns = [{"role": "user", "content": "A <image>\nB <image> C"}, {"role": "assistant", "content": "D"}]
    first, second = messages_with_images(turns, ["a.png", "b.png"])
    assert first["content"] == [
        words("A "),
        {"type": "image", "image": "a.png"},
        words("\nB "),
        {"type": "image", "image": "b.png"},
        words(" C"),
    ]
    assert second == {"role": "assistant", "content": [words("D")]}


TURNS = [
    {"role": "user", "content": "<image>?"},
    {"role": "assistant", "content": "!"},
    {"role": "user", "content": "<image>"},
]


@pytest.mark.parametrize(
    ("num_images", "told"),
    [
        (0, "message 1 (user) has an <image> without an image; got '2 <image> and 0 images'"),
        (1, "message 3 (user) has an <image> without an image; got '2 <image> and 1 images'"),
        (3, "an image is shown nowhere; got '2 <image> and 3 images'; expected one <image> per image"),
    ],
)
def test_images_that_do_not_match_the_placeholders_are_refused_by_message(num_images, told):
    with pytest.raises(InputError) as caught:
        messages_with_images(TURNS, ["a.png"] * num_images)
    assert str(caught.value).startswith(told)


@pytest.mark.parametrize("content", ["a <|image_pad|>", [picture(56, 56), words("<|image_pad|>")]])
def test_an_image_token_in_the_text_is_refused_by_message(tiny, content):
    with pytest.raises(InputError, match=r"^message 2 \(user\) has <\|image_pad\|> in its text; fix: remove it"):
        tiny.encode([{"role": "system", "content": "x"}, {"role": "user", "content": content}])


def test_a_template_that_hides_images_is_refused_with_the_messages_that_hold_them(tiny):
    blind = dataclasses.replace(tiny, chat_template="{% for message in messages %}{{ message.role }}{% endfor %}")
    turns = [{"role": "user", "content": [picture(56, 56)] * 2}, {"role": "user", "content": [picture(56, 56)]}]
    with pytest.raises(InputError, match=r"0 image placeholders for 3 images; got '2 in message 1 .*, 1 in message 2"):
        blind.encode(turns)


@pytest.mark.parametrize("content", [None, 3, [{"type": "video", "video": "a.mp4"}], [{"type": "text"}], ["text"]])
def test_a_content_that_is_neither_text_nor_image_is_refused(tiny, content):
    with pytest.raises(InputError, match=r"message 1 \(user\) has no content that can be read"):
        tiny.encode([{"role": "user", "content": content}])


def test_a_message_without_a_role_is_refused(tiny):
    with pytest.raises(InputError, match=r"message 1 .* has no role"):
        tiny.encode([{"content": "x"}])


def test_a_completion_with_control_tokens_is_refused(tiny):
    with pytest.raises(InputError, match="control tokens"):
        tiny.encode_example([{"role": "user", "content": "x"}], "a <|im_end|> b")


def test_a_lone_surrogate_is_refused(tiny):
    with pytest.raises(InputError, match="not Unicode"):
        tiny.encode([{"role": "user", "content": "\ud800"}])


def test_the_loss_covers_the_completion_and_its_end_alone(tiny):
    messages = [{"role": "user", "content": [picture(56, 56), words("What is near?")]}]
    prompt = tiny.encode(messages)
    encoded, loss_mask = tiny.encode_example(messages, "The ball.")
    length = len(prompt.tokens)
    assert loss_mask.tolist() == [0] * length + [1] * (len(encoded.tokens) - length)
    assert tiny.decode(encoded.tokens[loss_mask == 1], skip_special_tokens=False) == "The ball.<|im_end|>"
    np.testing.assert_array_equal(encoded.tokens[:length], prompt.tokens)
    np.testing.assert_array_equal(encoded.positions[:length], prompt.positions)
    assert encoded.positions[length:, 0].tolist() == [
        prompt.positions.max() + 1 + i for i in range(int(loss_mask.sum()))
    ]


def test_an_example_is_the_conversation_that_transformers_would_encode(directory):
    chat = ChatProcessor.from_directory(directory)
    messages = [{"role": "user", "content": [picture(84, 56), words("What is near?")]}]
    encoded, _ = chat.encode_example(messages, "The ball.")
    whole = chat.encode([*messages, {"role": "assistant", "content": "The ball."}], add_generation_prompt=False)
    np.testing.assert_array_equal(encoded.tokens, whole.tokens[: len(encoded.tokens)])
    np.testing.assert_array_equal(encoded.positions, whole.positions[: len(encoded.tokens)])
    assert chat.decode(whole.tokens[len(encoded.tokens) :]) == "\n"


@settings(deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_a_completion_is_decoded_as_it_was(tiny, completion):
    encoded, loss_mask = tiny.encode_example([{"role": "user", "content": "x"}], completion)
    assert tiny.decode(encoded.tokens[loss_mask == 1][:-1]) == completion


def test_control_tokens_are_forbidden_and_ends_are_not(shared_data):
    chat = ChatProcessor.from_directory(shared_data / "qwen2_5_tokenizer")
    assert chat.eos_ids == (151645, 151643)
    assert chat.pad_id == 151643
    assert (chat.ids.vision_start, chat.ids.vision_end, chat.ids.image_pad) == (151652, 151653, 151655)
    assert set(chat.forbidden_ids(152064)) == set(range(151643, 152064)) - {151643, 151645}


def test_a_checkpoints_own_template_wins_in_the_order_of_transformers(tiny_directory, tmp_path):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((tiny_directory / name).read_bytes())
    assert "<|image_pad|>" in ChatProcessor.from_directory(tmp_path).chat_template
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "legacy"}))
    assert ChatProcessor.from_directory(tmp_path).chat_template == "legacy"
    (tmp_path / "chat_template.jinja").write_text("own")
    assert ChatProcessor.from_directory(tmp_path).chat_template == "own"


def test_a_saved_processor_is_read_back_the_same(tiny, tmp_path):
    tiny.save(tmp_path)
    loaded = ChatProcessor.from_directory(tmp_path)
    assert (loaded.chat_template, loaded.ids, loaded.image_processor) == (
        tiny.chat_template,
        tiny.ids,
        tiny.image_processor,
    )
    for messages in CONVERSATIONS:
        assert loaded.encode(messages).tokens.tolist() == tiny.encode(messages).tokens.tolist()


def test_a_directory_without_a_tokenizer_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"no tokenizer here"):
        ChatProcessor.from_directory(tmp_path)


def test_a_tokenizer_of_another_family_is_refused(tmp_path):
    tokenizer = train_tokenizer(["text"], vocab_size=263)
    write_tokenizer(tokenizer, tmp_path)
    (tmp_path / "tokenizer.json").write_text(tokenizer.to_str().replace("<|image_pad|>", "<|other|>"))
    with pytest.raises(InputError, match="image_pad"):
        ChatProcessor.from_directory(tmp_path)
