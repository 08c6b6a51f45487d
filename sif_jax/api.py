"""The object that notebooks call: load a checkpoint, encode, score, generate, save (io)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float, Float32

from sif_jax.config import BucketsConfig, ModelConfig
from sif_jax.data.batch import Collator
from sif_jax.data.example import Example
from sif_jax.errors import InputError
from sif_jax.models.qwen2_5_vl.adapter import save_adapter
from sif_jax.models.qwen2_5_vl.chat import ChatProcessor, Encoded, Messages
from sif_jax.models.qwen2_5_vl.checkpoint import find_checkpoint, open_model, open_processor
from sif_jax.models.qwen2_5_vl.config import Qwen2_5_VLConfig
from sif_jax.models.qwen2_5_vl.lora import lora_of, merge_lora
from sif_jax.models.qwen2_5_vl.model import Batch
from sif_jax.models.qwen2_5_vl.weights import save_model
from sif_jax.rollout.engine import encode_images, generate
from sif_jax.rollout.sampling import Sampling, sample_keys
from sif_jax.rollout.stops import before_stop

TOKEN_STEP, PATCH_STEP = 256, 256  # inputs are padded to multiples, so that few programs are compiled


@dataclass(frozen=True)
class Completion:
    text: str
    ids: list[int]  # the stop token included
    logprobs: list[float]  # nats, of each id under the model at the sampling temperature
    finish_reason: Literal["stop", "length"]


def load(
    path: str | Path,
    dtype: Literal["float32", "bfloat16"] = "float32",
    mesh: Mesh | None = None,
    *,
    adapter: str | Path | None = None,
    min_pixels: int | None = None,
    max_pixels: int | None = None,
    other_pixels: bool = False,
) -> VLM:
    """Open a Hugging Face directory, a PEFT adapter (with its base), or one of our runs; lay `adapter` over it.

    On a mesh with an "fsdp" axis the weights are split over it. `other_pixels` allows pixel limits other than those the
    checkpoint was trained with.

    Raises:
      InputError: something in the directory is missing or does not fit together.
    """
    config = ModelConfig(
        path=str(path),
        adapter=None if adapter is None else str(adapter),
        dtype=dtype,
        remat="none",
        min_pixels=min_pixels,
        max_pixels=max_pixels,
        other_pixels=other_pixels,
    )
    model = open_model(config, mesh)
    return VLM(open_processor(config), model.config, *nnx.split(model), find_checkpoint(config).base)


@dataclass(frozen=True)
class VLM:
    processor: ChatProcessor
    config: Qwen2_5_VLConfig
    graphdef: nnx.GraphDef
    state: nnx.State
    source: Path

    def encode(self, messages: Messages) -> Encoded:
        """Tokens, positions and patches of chat messages, ready for an answer; images are PIL, arrays or paths."""
        return self.processor.encode(messages)

    def logits(self, inputs: Encoded) -> Float32[np.ndarray, "T V"]:
        """Scores of the next token after each of the T tokens, from one full forward pass."""
        logits = _logits(self.graphdef, self.state, self._batch(inputs))
        return np.asarray(logits)[0, : len(inputs.tokens)]

    def logprobs(self, inputs: Encoded, completion_ids: Sequence[int] | np.ndarray) -> Float32[np.ndarray, " C"]:
        """Log-probability of each token of a completion that follows the inputs, in nats."""
        continued = _continue(inputs, completion_ids)
        logits = self.logits(continued)[len(inputs.tokens) - 1 : -1]
        logprobs = np.asarray(jax.nn.log_softmax(logits))
        return logprobs[np.arange(len(completion_ids)), np.asarray(completion_ids, np.int64)]

    def generate(
        self,
        messages: Messages,
        max_new_tokens: int = 512,
        num_samples: int = 1,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        stop: Sequence[str] = (),
        stop_ids: Sequence[int] = (),
        max_length: int | None = None,
        seed: int = 0,
    ) -> list[Completion]:
        """`num_samples` answers; temperature 0 is greedy. The same seed gives the same samples.

        A completion ends with the model's own end of turn, one of `stop_ids`, or where a string of `stop` is complete; that
        string is not in its text, its tokens are in its ids. Prompt and completion have room for `max_length` tokens, by
        default what the model was made for.

        Raises:
          InputError: nothing to sample, settings out of range, or no room; nothing has been computed then.
        """
        processor = self.processor
        sampling = Sampling(
            max_new_tokens,
            (*processor.eos_ids, *stop_ids),
            processor.forbidden_ids(self.config.text.vocab_size),
            temperature,
            top_k,
            top_p,
            min_p,
            tuple(stop) if not isinstance(stop, str) else (stop,),
        )
        inputs = self.encode(messages)
        self._check_room(inputs, max_new_tokens, max_length)
        if num_samples < 1:
            raise InputError("nothing to sample", value=num_samples, expected="num_samples >= 1")
        batch, states = self._batch(inputs), (self.state,)
        keys = sample_keys(seed, 0, np.zeros(1, np.int32), num_samples)
        features = encode_images(self.graphdef, states, batch)
        rollout = generate(
            self.graphdef,
            states,
            batch,
            features,
            keys,
            sampling=sampling,
            pad_id=processor.pad_id,
            decode_text=processor.decode,
        )
        rows = zip(*(np.asarray(x[0]) for x in rollout), strict=True)
        return [
            Completion(
                before_stop(processor.decode(ids[:length]), sampling.stop),
                ids[:length].tolist(),
                logprobs[:length].tolist(),
                "stop" if finished else "length",
            )
            for ids, logprobs, length, finished in rows
        ]

    def _check_room(self, inputs: Encoded, max_new_tokens: int, max_length: int | None) -> None:
        limit, prompt = max_length or self.config.text.max_positions, len(inputs.tokens)
        shown = [len(image.patches) // self.config.vision.merge_unit for image in inputs.images]
        largest = max(shown, default=0)
        if largest >= limit:
            raise InputError(
                f"image {shown.index(largest) + 1} has more tokens than the sequence",
                value=largest,
                expected=f"fewer than max_length={limit}",
                fix="lower max_pixels, or raise max_length",
            )
        if prompt + max_new_tokens > limit:
            room = limit - prompt
            raise InputError(
                "the prompt is longer than the cache" if room < 1 else "no room for so many new tokens",
                value=f"{prompt} prompt tokens, {sum(shown)} of them images, and max_new_tokens={max_new_tokens}",
                expected=f"at most max_length={limit} together",
                fix="lower max_pixels, shorten the prompt, or raise max_length"
                if room < 1
                else f"set max_new_tokens={room} or less",
            )

    def merged(self) -> VLM:
        """The same model with its adapter folded into the weights; this one stays as it is."""
        model = nnx.merge(self.graphdef, jax.tree.map(jnp.copy, self.state))
        merge_lora(model)
        return dataclasses.replace(self, **dict(zip(("graphdef", "state"), nnx.split(model))))

    def save_pretrained(self, directory: str | Path) -> None:
        """Write a Hugging Face directory that transformers and `load` read; of a model with an adapter, the adapter alone
        in PEFT's layout (`merged()` gives the whole).

        Raises:
          InputError: the directory exists, or the disk is full.
        """
        model = nnx.merge(self.graphdef, self.state)
        if lora_of(model).factors:
            save_adapter(model, directory, base=str(self.source))
        else:
            save_model(model, directory, source=self.source)

    def _batch(self, inputs: Encoded) -> dict[str, np.ndarray]:
        example = Example(*inputs[:2], np.zeros(len(inputs.tokens), np.float32), inputs.images, 0)
        buckets = BucketsConfig(
            tokens=(_round_up(len(inputs.tokens), TOKEN_STEP),),
            patches=(_round_up(example.num_patches, PATCH_STEP),),
        )
        collate = Collator.for_model(self.processor, self.config.vision, buckets, 1)
        return collate([[example]]).arrays


@partial(jax.jit, static_argnames="graphdef")
def _logits(graphdef: nnx.GraphDef, state: nnx.State, batch: Batch) -> Float[Array, "B L V"]:
    model = nnx.merge(graphdef, state)
    return model.logits(model.hidden(batch))


def _continue(inputs: Encoded, ids: Sequence[int] | np.ndarray) -> Encoded:
    steps = inputs.positions.max() + 1 + np.arange(len(ids), dtype=np.int32)
    return Encoded(
        np.concatenate([inputs.tokens, np.asarray(ids, np.int32)]),
        np.concatenate([inputs.positions, np.repeat(steps[:, None], 3, axis=1)]),
        inputs.images,
    )


def _round_up(count: int, step: int) -> int:
    return -(-count // step) * step
