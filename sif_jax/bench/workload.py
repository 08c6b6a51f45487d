"""A gradient step to measure: a model known by its shapes alone, and examples with two images each (pure)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax.numpy as jnp
import numpy as np
from flax import nnx

from sif_jax.config import BucketsConfig, LoraConfig
from sif_jax.data.batch import Collator, RowFiller
from sif_jax.data.example import Example
from sif_jax.errors import InputError
from sif_jax.models.qwen2_5_vl.config import Qwen2_5_VLConfig
from sif_jax.models.qwen2_5_vl.image_processor import PatchedImage
from sif_jax.models.qwen2_5_vl.layout import mrope_positions
from sif_jax.models.qwen2_5_vl.lora import add_lora, split_trainable
from sif_jax.models.qwen2_5_vl.model import Qwen2_5_VL
from sif_jax.ops.scan import Remat

PolicyState = tuple[nnx.GraphDef, nnx.State, nnx.State]
IMAGES_PER_EXAMPLE = 2


def abstract_policy(
    config: Qwen2_5_VLConfig,
    *,
    dtype: str = "float32",
    remat: Remat = "none",
    lora_rank: int | None = 8,
    freeze_vision: bool = True,
) -> PolicyState:
    """(graphdef, trainable, frozen) with shapes in place of arrays; `lora_rank` None trains every weight."""
    model = nnx.eval_shape(_maker(config, dtype, remat, lora_rank, freeze_vision))
    return split_trainable(model, lora=lora_rank is not None, freeze_vision=freeze_vision)


def random_policy(
    config: Qwen2_5_VLConfig, *, dtype: str, lora_rank: int | None = 8, freeze_vision: bool = True
) -> PolicyState:
    """The same with random weights."""
    model = _maker(config, dtype, "none", lora_rank, freeze_vision)()
    return split_trainable(model, lora=lora_rank is not None, freeze_vision=freeze_vision)


def _maker(
    config: Qwen2_5_VLConfig, dtype: str, remat: Remat, lora_rank: int | None, freeze_vision: bool
) -> Callable[[], Qwen2_5_VL]:
    def make() -> Qwen2_5_VL:
        rngs = nnx.Rngs(params=0)
        model = Qwen2_5_VL(config, param_dtype=jnp.dtype(dtype), remat=remat, rngs=rngs)
        if lora_rank is not None:
            add_lora(model, **LoraConfig(rank=lora_rank).model_dump(), freeze_vision=freeze_vision, rngs=rngs)
        return model

    return make


def random_batch(
    config: Qwen2_5_VLConfig, *, rows: int, tokens: int, image_px: tuple[int, int]
) -> dict[str, np.ndarray]:
    """Rows of `tokens` tokens, each with two images of (width, height) pixels; every token after them is a target.

    Raises:
      InputError: the images leave no room for text, or their sides are not whole merged patches.
    """
    return in_rows(config, random_examples(config, [tokens] * rows, image_px=image_px), tokens=tokens)


def random_examples(
    config: Qwen2_5_VLConfig, lengths: Sequence[int], *, image_px: tuple[int, int]
) -> tuple[Example, ...]:
    """One example of so many tokens each, as in `random_batch`.

    Raises:
      InputError: the images leave no room for text, or their sides are not whole merged patches.
    """
    vision, rng = config.vision, np.random.default_rng(0)
    odd = [side for side in image_px if side % (vision.patch_size * vision.spatial_merge_size)]
    if odd:
        raise InputError("image_px is not a whole number of merged patches", value=odd[0], expected="a multiple of 28")
    width, height = (side // vision.patch_size for side in image_px)
    grid = (height, width)
    shown = [
        config.vision_start_token_id,
        *[config.image_token_id] * (height * width // vision.merge_unit),
        config.vision_end_token_id,
    ] * IMAGES_PER_EXAMPLE
    if len(shown) >= min(lengths):
        raise InputError("the images fill the row", value=f"tokens={min(lengths)}", expected=f"more than {len(shown)}")

    def example(index: int, length: int) -> Example:
        text = rng.integers(0, config.text.vocab_size - 1, length - len(shown))
        ids = np.array([*shown, *(text + (text >= config.image_token_id))], np.int32)
        positions = mrope_positions(
            ids, [grid] * IMAGES_PER_EXAMPLE, image_token_id=config.image_token_id, merge_size=vision.spatial_merge_size
        )
        images = tuple(
            PatchedImage(rng.standard_normal((height * width, vision.patch_dim), np.float32), grid)
            for _ in range(IMAGES_PER_EXAMPLE)
        )
        mask = (np.arange(length) >= len(shown)).astype(np.float32)
        return Example(ids, positions, mask, images, index)

    return tuple(example(index, length) for index, length in enumerate(lengths))


def in_rows(
    config: Qwen2_5_VLConfig, examples: Sequence[Example], *, tokens: int, pack: bool = False
) -> dict[str, np.ndarray]:
    """Rows of `tokens` tokens: one per example, or as few as first-fit packing needs."""
    filler = RowFiller(_collator(config, len(examples), tokens, sum(x.num_patches for x in examples)), pack=pack)
    for each in examples:
        filler.add(each)
    patches = max(sum(x.num_patches for x in row) for row in filler.rows)
    return _collator(config, len(filler.rows), tokens, patches)(filler.rows).arrays


def _collator(config: Qwen2_5_VLConfig, rows: int, tokens: int, patches: int) -> Collator:
    vision = config.vision
    return Collator(
        buckets=BucketsConfig(tokens=(tokens,), patches=(patches,)),
        batch_size=rows,
        pad_id=0,
        image_token_id=config.image_token_id,
        merge_size=vision.spatial_merge_size,
        window_patches=vision.window_size // vision.patch_size,
        patch_dim=vision.patch_dim,
    )
