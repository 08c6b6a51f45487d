"""A gradient step to measure: a model known by its shapes alone, and a batch of two images per row (pure)."""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from flax import nnx

from sif_jax.config import BucketsConfig, LoraConfig
from sif_jax.data.batch import Collator
from sif_jax.data.example import Example
from sif_jax.errors import InputError
from sif_jax.models.qwen2_5_vl.config import Qwen2_5_VLConfig
from sif_jax.models.qwen2_5_vl.image_processor import PatchedImage
from sif_jax.models.qwen2_5_vl.layout import mrope_positions
from sif_jax.models.qwen2_5_vl.lora import add_lora, split_trainable
from sif_jax.models.qwen2_5_vl.model import Qwen2_5_VL
from sif_jax.ops.scan import Remat

PolicyState = tuple[nnx.GraphDef, nnx.State, nnx.State]
IMAGES_PER_ROW = 2


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
    vision, rng = config.vision, np.random.default_rng(0)
    odd = [side for side in image_px if side % (vision.patch_size * vision.spatial_merge_size)]
    if odd:
        raise InputError("image_px is not a whole number of merged patches", value=odd[0], expected="a multiple of 28")
    width, height = (side // vision.patch_size for side in image_px)
    grid, patches = (height, width), IMAGES_PER_ROW * height * width
    shown = [
        config.vision_start_token_id,
        *[config.image_token_id] * (height * width // vision.merge_unit),
        config.vision_end_token_id,
    ] * IMAGES_PER_ROW
    if len(shown) >= tokens:
        raise InputError("the images fill the row", value=f"tokens={tokens}", expected=f"more than {len(shown)}")

    def example(index: int) -> Example:
        text = rng.integers(0, config.text.vocab_size - 1, tokens - len(shown))
        ids = np.array([*shown, *(text + (text >= config.image_token_id))], np.int32)
        positions = mrope_positions(
            ids, [grid] * IMAGES_PER_ROW, image_token_id=config.image_token_id, merge_size=vision.spatial_merge_size
        )
        images = tuple(
            PatchedImage(rng.standard_normal((height * width, vision.patch_dim), np.float32), grid)
            for _ in range(IMAGES_PER_ROW)
        )
        mask = (np.arange(tokens) >= len(shown)).astype(np.float32)
        return Example(ids, positions, mask, images, index)

    collate = Collator(
        buckets=BucketsConfig(tokens=(tokens,), patches=(patches,)),
        batch_size=rows,
        pad_id=0,
        image_token_id=config.image_token_id,
        merge_size=vision.spatial_merge_size,
        window_patches=vision.window_size // vision.patch_size,
        patch_dim=vision.patch_dim,
    )
    return collate([[example(row)] for row in range(rows)]).arrays
