"""A small byte-level BPE tokenizer for the demo and the tests, written as a Hugging Face directory (host).

It makes traces short and easy to copy from. A word is at most one token, wherever it stands. Decimals are one digit per
token, so numbers are always spelled alike, and the `0.` or `1.` before them belongs to the markup in front: `],"depth":0.`
is one token. Fixed phrases, such as the prompt's instructions, are one token each.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from sif_jax.errors import InputError
from sif_jax.models.qwen2_5_vl.chat import TEMPLATE_FILE

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
_NUM_BYTES = 256
_MARKUP = r'(?:</?[a-z]+>|"[a-z0-9_]+":|[\[\]{},])+'
_UNITS = r"(?<![0-9])[01]\.(?=[0-9]{3}(?![0-9]))"
_SPLIT = rf"(?:{_MARKUP})?{_UNITS}|{_MARKUP}|[ \n]?[A-Za-z]+|[0-9]|[^A-Za-z0-9]"
# A class of transformers that keeps the file's own pre-tokenizer; Qwen2Tokenizer would put Qwen's in its place.
_CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "eos_token": "<|im_end|>",
    "pad_token": "<|endoftext|>",
    "clean_up_tokenization_spaces": False,
}


def train_tokenizer(corpus: Iterable[str], *, phrases: Sequence[str] = (), vocab_size: int = 512) -> Tokenizer:
    """Train on texts, such as rendered chats; merges do not cross their special tokens, which get the ids 0, 1, ...

    The phrases get the last ids. The same corpus gives the same tokenizer.
    """
    smallest = len(SPECIAL_TOKENS) + _NUM_BYTES + len(phrases)
    if vocab_size < smallest:
        raise InputError("the vocabulary is too small", value=vocab_size, expected=f"vocab_size >= {smallest}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(phrases),
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    fixed = re.compile("|".join(map(re.escape, (*SPECIAL_TOKENS, *phrases))))
    tokenizer.train_from_iterator((piece for text in corpus for piece in fixed.split(text)), trainer)
    tokenizer.add_tokens([AddedToken(phrase, normalized=False) for phrase in phrases])
    return tokenizer


def write_tokenizer(tokenizer: Tokenizer, directory: str | Path) -> None:
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps(_CONFIG, indent=2) + "\n")
    shutil.copyfile(Path(__file__).with_name(TEMPLATE_FILE), directory / TEMPLATE_FILE)
