"""Chat messages with images to tokens and M-RoPE positions, token for token as transformers' Qwen2_5_VLProcessor (host)."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, SupportsIndex, cast

import numpy as np
from jaxtyping import Float32, Int32
from PIL import Image
from transformers import PreTrainedTokenizerFast, Qwen2Tokenizer

from sif_jax.errors import InputError
from sif_jax.models.qwen2_5_vl.image_processor import ImageProcessor, PatchedImage, load_image
from sif_jax.models.qwen2_5_vl.layout import mrope_positions

IMAGE_PLACEHOLDER = "<image>"
IMAGE_TOKEN = "<|image_pad|>"
TEMPLATE_FILE = "chat_template.jinja"
LEGACY_TEMPLATE_FILE = "chat_template.json"
TOKENIZERS = {  # by the class that tokenizer_config.json names
    "Qwen2Tokenizer": Qwen2Tokenizer,
    "Qwen2TokenizerFast": Qwen2Tokenizer,
    "PreTrainedTokenizerFast": PreTrainedTokenizerFast,
}

Messages = Sequence[Mapping[str, Any]]  # [{"role": ..., "content": str | [{"type": "image" | "text", ...}, ...]}, ...]


class Encoded(NamedTuple):
    tokens: Int32[np.ndarray, " L"]
    positions: Int32[np.ndarray, "L 3"]
    images: tuple[PatchedImage, ...]


class SpecialIds(NamedTuple):
    image_pad: int
    vision_start: int
    vision_end: int
    im_end: int
    endoftext: int


@dataclass(frozen=True)
class ChatProcessor:
    tokenizer: PreTrainedTokenizerFast
    image_processor: ImageProcessor
    chat_template: str
    ids: SpecialIds

    @classmethod
    def from_directory(cls, directory: str | Path, **image_settings: Any) -> ChatProcessor:
        """Tokenizer, chat template and image processor of a Hugging Face directory.

        A directory without a chat template gets Qwen2.5-VL's. `image_settings` (such as `max_pixels`) win over the file.
        """
        directory = Path(directory)
        if not (directory / "tokenizer.json").is_file():
            raise InputError(
                "no tokenizer here", file=directory, expected="a Hugging Face directory with tokenizer.json"
            )
        tokenizer = _load_tokenizer(directory)
        return cls(
            tokenizer,
            ImageProcessor.from_directory(directory, **image_settings),
            _read_template(directory, tokenizer),
            _special_ids(tokenizer, directory),
        )

    def save(self, directory: str | Path) -> None:
        """Write what `from_directory` and transformers' AutoProcessor read."""
        self.tokenizer.save_pretrained(directory)
        (Path(directory) / TEMPLATE_FILE).write_text(self.chat_template)
        self.image_processor.save(directory)

    @property
    def pad_id(self) -> int:
        return self.ids.endoftext

    @property
    def eos_ids(self) -> tuple[int, ...]:
        return self.ids.im_end, self.ids.endoftext

    def forbidden_ids(self, vocab_size: int) -> tuple[int, ...]:
        """What a sampler must never emit: every added token but the ends of a completion, and rows of the embedding table
        (`vocab_size` of them) that no token has."""
        added = set(self.tokenizer.added_tokens_decoder) - set(self.eos_ids)
        return tuple(sorted(added | set(range(len(self.tokenizer), vocab_size))))

    def encode(self, messages: Messages, *, add_generation_prompt: bool = True) -> Encoded:
        """
        Raises:
          InputError: a content part is neither text nor image, or the template shows another number of images.
        """
        turns = [_checked(number, message) for number, message in enumerate(messages, 1)]
        tokens = np.array(self._text_ids(self._render(turns, add_generation_prompt)), np.int32)
        _check_all_shown(turns, int((tokens == self.ids.image_pad).sum()))
        parts = [part for turn in turns for part in _image_parts(turn)]
        return self._with_images(tokens, tuple(self.image_processor.patches(_opened(part["image"])) for part in parts))

    def encode_example(self, messages: Messages, completion: str) -> tuple[Encoded, Float32[np.ndarray, " L"]]:
        """Prompt and completion, and the loss mask: 1 on the completion's tokens and the `<|im_end|>` that ends it.

        The completion is tokenised alone, as the model will sample it.
        """
        prompt = self.encode(messages)
        completion_ids = self._text_ids(completion)
        if not set(self.tokenizer.added_tokens_decoder).isdisjoint(completion_ids):
            raise InputError("a completion holds control tokens", value=completion, fix="remove <|...|> from the text")
        targets = np.array([*completion_ids, self.ids.im_end], np.int32)
        steps = prompt.positions.max() + 1 + np.arange(len(targets), dtype=np.int32)
        encoded = Encoded(
            np.concatenate([prompt.tokens, targets]),
            np.concatenate([prompt.positions, np.repeat(steps[:, None], 3, axis=1)]),
            prompt.images,
        )
        return encoded, np.repeat(np.array([0, 1], np.float32), [len(prompt.tokens), len(targets)])

    def decode(self, ids: Iterable[SupportsIndex], *, skip_special_tokens: bool = True) -> str:
        return cast(str, self.tokenizer.decode([int(i) for i in ids], skip_special_tokens=skip_special_tokens))

    def _render(self, turns: list[dict[str, Any]], add_generation_prompt: bool) -> str:
        text = self.tokenizer.apply_chat_template(
            turns, chat_template=self.chat_template, tokenize=False, add_generation_prompt=add_generation_prompt
        )
        return cast(str, text)

    def _text_ids(self, text: str) -> list[int]:
        # The backend may be called from several threads; the tokenizer's own call sets its padding state first.
        try:
            return self.tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids
        except TypeError:
            raise InputError(
                "the text is not Unicode", value=text, fix="remove lone surrogates (\\ud800 ...)"
            ) from None

    def _with_images(self, tokens: Int32[np.ndarray, " T"], images: tuple[PatchedImage, ...]) -> Encoded:
        placeholders = tokens == self.ids.image_pad
        repeats = np.ones(len(tokens), np.int64)
        repeats[placeholders] = [len(image.patches) // self.image_processor.merge_size**2 for image in images]
        tokens = np.repeat(tokens, repeats)
        positions = mrope_positions(
            tokens,
            [image.grid_hw for image in images],
            image_token_id=self.ids.image_pad,
            merge_size=self.image_processor.merge_size,
        )
        return Encoded(tokens, positions, images)


def messages_with_images(messages: Messages, images: Sequence[Any]) -> list[dict[str, Any]]:
    """Put `images` in the place of the `<image>` placeholders of string contents, in order.

    Raises:
      InputError: there are more or fewer placeholders than images.
    """
    holders = []
    for number, message in enumerate(messages, 1):
        name, content = _named(number, message), message.get("content")
        if not isinstance(content, str):
            raise InputError(f"{name} has no text", value=content, expected=f"a string with {IMAGE_PLACEHOLDER}")
        holders += [name] * content.count(IMAGE_PLACEHOLDER)
    if len(holders) != len(images):
        surplus = holders[len(images) :]
        missing = (
            f"{surplus[0]} has an {IMAGE_PLACEHOLDER} without an image" if surplus else "an image is shown nowhere"
        )
        raise InputError(
            missing,
            value=f"{len(holders)} {IMAGE_PLACEHOLDER} and {len(images)} images",
            expected=f"one {IMAGE_PLACEHOLDER} per image",
        )
    remaining = iter(images)
    return [{**message, "content": _parts(message["content"], remaining)} for message in messages]


def _parts(text: str, images: Iterable[Any]) -> list[dict[str, Any]]:
    pieces = re.split(f"({IMAGE_PLACEHOLDER})", text)
    return [
        {"type": "image", "image": next(iter(images))}
        if piece == IMAGE_PLACEHOLDER
        else {"type": "text", "text": piece}
        for piece in pieces
        if piece
    ]


def _checked(number: int, message: Mapping[str, Any]) -> dict[str, Any]:
    name, content = _named(number, message), message.get("content")
    if not isinstance(message.get("role"), str):
        raise InputError(f"{name} has no role", value=message.get("role"), expected="'system', 'user' or 'assistant'")
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    kinds = ({"type": "text", "text": str}, {"type": "image", "image": object})
    if not isinstance(parts, Sequence) or not all(any(_is_part(part, kind) for kind in kinds) for part in parts):
        raise InputError(
            f"{name} has no content that can be read",
            value=content,
            expected='a string or a list of {"type": "text", "text": ...} and {"type": "image", "image": ...}',
        )
    if any(IMAGE_TOKEN in part["text"] for part in parts if part["type"] == "text"):
        raise InputError(
            f"{name} has {IMAGE_TOKEN} in its text", fix="remove it; an image is a content part of its own"
        )
    return dict(message)


def _named(number: int, message: Mapping[str, Any]) -> str:
    return f"message {number} ({message.get('role')})"


def _is_part(part: object, kind: Mapping[str, Any]) -> bool:
    (_, name), (key, value_type) = kind.items()
    return isinstance(part, Mapping) and part.get("type") == name and isinstance(part.get(key), value_type)


def _image_parts(turn: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    content = turn["content"]
    return [] if isinstance(content, str) else [part for part in content if part["type"] == "image"]


def _check_all_shown(turns: Sequence[Mapping[str, Any]], num_placeholders: int) -> None:
    counts = [len(_image_parts(turn)) for turn in turns]
    if num_placeholders != sum(counts):
        held = (f"{count} in {_named(n, turn)}" for n, (turn, count) in enumerate(zip(turns, counts), 1) if count)
        raise InputError(
            f"the chat template writes {num_placeholders} image placeholders for {sum(counts)} images",
            value=", ".join(held) or None,
            fix="use Qwen2.5-VL's chat template",
        )


def _opened(image: object) -> Image.Image | np.ndarray:
    if isinstance(image, Image.Image | np.ndarray):
        return image
    if isinstance(image, str | Path):
        return load_image(image)
    raise InputError("not an image", value=type(image).__name__, expected="a PIL image, a uint8 array or a path")


def _load_tokenizer(directory: Path) -> PreTrainedTokenizerFast:
    """What `AutoTokenizer` loads, which takes seconds more: it imports PyTorch, where that is installed."""
    file = directory / "tokenizer_config.json"
    named = json.loads(file.read_text()).get("tokenizer_class") if file.is_file() else None
    if named in TOKENIZERS:
        return TOKENIZERS[named].from_pretrained(directory, local_files_only=True)
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(directory, local_files_only=True)


def _read_template(directory: Path, tokenizer: PreTrainedTokenizerFast) -> str:
    """In transformers' order: chat_template.jinja, chat_template.json, the tokenizer's own."""
    if (directory / LEGACY_TEMPLATE_FILE).is_file() and not (directory / TEMPLATE_FILE).is_file():
        return json.loads((directory / LEGACY_TEMPLATE_FILE).read_text())["chat_template"]
    if tokenizer.chat_template:
        return tokenizer.get_chat_template()
    return Path(__file__).with_name(TEMPLATE_FILE).read_text()


def _special_ids(tokenizer: PreTrainedTokenizerFast, directory: Path) -> SpecialIds:
    found = [(name, tokenizer.backend_tokenizer.token_to_id(f"<|{name}|>")) for name in SpecialIds._fields]
    ids = {name: token_id for name, token_id in found if token_id is not None}
    if missing := sorted(set(SpecialIds._fields) - set(ids)):
        raise InputError("not a Qwen2.5-VL tokenizer", file=directory, value=missing, expected="these special tokens")
    return SpecialIds(**ids)
