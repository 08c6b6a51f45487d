"""The demo's tokenizer: short traces, lossless, deterministic, and loaded unchanged by transformers."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLConfig

from sif_jax.errors import InputError
from sif_jax.models.qwen2_5_vl.tiny_tokenizer import SPECIAL_TOKENS, train_tokenizer, write_tokenizer
from sif_jax.sif.prompts import user_text

TRACE = (
    '<think><area>[{{"bbox_2d":[0.{0:03},0.{1:03},1.000,0.{2:03}],"depth":0.{0:03}}}]</area><text>The {3} is near.</text>'
    '<area>[{{"bbox_2d":[0.{1:03},0.{1:03},0.{1:03},0.{2:03}],"depth":0.{2:03}}},{{"bbox_2d":[0.{1:03},0.{0:03},0.{1:03},'
    '0.{2:03}],"depth":1.000}}]</area><text>Look at the {3}.</text></think><answer>{3}</answer>'
)
BOX = '},{"bbox_2d":[0.123,0.456,0.789,0.990],"depth":0.512'


PHRASES = [piece for piece in user_text("@").replace("<image>", "@").split("@") if len(piece) > 2]


def corpus():
    for i in range(60):
        thing = ("red ball", "blue cube", "green cone")[i % 3]
        yield f"<|im_start|>user\n{user_text(f'Where is the {thing}?')}<|im_end|>\n<|im_start|>assistant\n"
        yield TRACE.format(i, 7 * i % 1000, 999 - i, thing)


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(corpus(), phrases=PHRASES, vocab_size=512)


def pieces(tokenizer, text):
    return [tokenizer.decode([token], skip_special_tokens=False) for token in tokenizer.encode(text).ids]


def test_a_box_with_its_depth_costs_five_tokens_and_its_digits(tokenizer):
    numbers = pieces(tokenizer, BOX)
    assert [piece for piece in numbers if not piece.isdigit()] == [
        '},{"bbox_2d":[0.',
        ",0.",
        ",0.",
        ",0.",
        '],"depth":0.',
    ]
    assert "".join(piece for piece in numbers if piece.isdigit()) == "123456789990512"
    assert len(numbers) == 20


def test_the_markup_between_two_steps_is_one_token(tokenizer):
    steps = pieces(tokenizer, '<text>The red ball is near.</text><area>[{"bbox_2d":[0.5')
    assert '</text><area>[{"bbox_2d":[0.' not in steps  # 0.5 is not a three-decimal number
    assert '</text><area>[{"bbox_2d":[0.' in pieces(tokenizer, 'The red ball is near.</text><area>[{"bbox_2d":[0.500')


def test_each_fixed_phrase_of_the_prompt_is_one_token(tokenizer):
    assert [pieces(tokenizer, phrase) for phrase in PHRASES] == [[phrase] for phrase in PHRASES]
    assert set(PHRASES) < set(pieces(tokenizer, user_text("Where is the red ball?")))


def test_a_word_is_the_same_token_wherever_it_stands(tokenizer):
    assert [pieces(tokenizer, text).count(" red") for text in ("the red ball,", "is the red?", " red")] == [1, 1, 1]


@pytest.mark.parametrize("text", ["12.345", "10.5", "0.1234", "room 101, 1.5", "a1.000", "11.000"])
def test_other_numbers_are_single_digits_too(tokenizer, text):
    assert [piece for piece in pieces(tokenizer, text) if piece in "0123456789"][-1] == text[-1]
    assert all(sum(c.isdigit() for c in piece) <= 1 for piece in pieces(tokenizer, text))


@settings(deadline=None, max_examples=300)
@given(st.text(), st.text("0123456789.,[]{}<>/ _abc\n", max_size=40))
def test_any_text_survives_the_round_trip(tokenizer, first, second):
    text = first + second
    ids = tokenizer.encode(text).ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == text


def test_training_twice_gives_the_same_tokenizer(tokenizer):
    assert train_tokenizer(corpus(), phrases=PHRASES, vocab_size=512).to_str() == tokenizer.to_str()


def test_special_tokens_come_first_and_merges_do_not_cross_them(tokenizer):
    assert [tokenizer.token_to_id(token) for token in SPECIAL_TOKENS] == list(range(7))
    assert not [token for token in tokenizer.get_vocab() if "<|" in token and token not in SPECIAL_TOKENS]


def test_the_vocabulary_is_bounded(tokenizer):
    assert train_tokenizer(corpus(), vocab_size=300).get_vocab_size() == 300
    with pytest.raises(InputError, match="vocab_size >= 263"):
        train_tokenizer(corpus(), vocab_size=262)


@pytest.mark.parametrize("with_model_config", [False, True])
def test_transformers_loads_the_directory_unchanged(tokenizer, tmp_path, with_model_config):
    write_tokenizer(tokenizer, tmp_path)
    if with_model_config:
        (tmp_path / "config.json").write_text(json.dumps(Qwen2_5_VLConfig().to_dict()))
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    for text in [*corpus(), BOX, "naïve 東京 1.5\n\n  <|image_pad|>"]:
        assert loaded(text)["input_ids"] == tokenizer.encode(text).ids
    assert (loaded.eos_token, loaded.pad_token) == ("<|im_end|>", "<|endoftext|>")
    assert "<|image_pad|>" in loaded.chat_template
