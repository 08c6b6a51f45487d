"""Qwen2.5-VL (arXiv:2502.13923): vision tower, decoder and head over one batch of arrays (pure).

A batch is the contract of docs/architecture.md. The modules only hold parameters: split them with `nnx.split`, pass the
state through jit, merge inside.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Shaped

from sif_jax.models.qwen2_5_vl.config import Qwen2_5_VLConfig
from sif_jax.models.qwen2_5_vl.decoder import Decoder, along_rows
from sif_jax.models.qwen2_5_vl.layers import Key
from sif_jax.models.qwen2_5_vl.vision import VisionTower
from sif_jax.ops.attention_backends import Backend
from sif_jax.ops.scan import Remat
from sif_jax.ops.windows import take_rows
from sif_jax.parallel.partition import constrain

Batch = Mapping[str, Array]


class Qwen2_5_VL(nnx.Module):  # noqa: N801  the model's published name
    def __init__(
        self,
        config: Qwen2_5_VLConfig,
        *,
        param_dtype: DTypeLike = jnp.float32,
        compute_dtype: DTypeLike | None = None,
        remat: Remat = "none",
        attention: Backend = "xla",
        scan_layers: bool = True,
        rngs: nnx.Rngs,
    ):
        vocab, dim = config.text.vocab_size, config.text.hidden_size
        initial = nnx.initializers.normal(0.02)
        self.vision = VisionTower(config.vision, dtype=param_dtype, attention=attention, rngs=rngs)
        self.embed_tokens = nnx.Param(initial(rngs.params(), (vocab, dim), param_dtype))
        self.decoder = Decoder(config.text, dtype=param_dtype, attention=attention, scan_layers=scan_layers, rngs=rngs)
        tied = config.text.tie_word_embeddings
        self.lm_head = None if tied else nnx.Param(initial(rngs.params(), (dim, vocab), param_dtype))
        self.config = config
        self.compute_dtype = compute_dtype or param_dtype
        self.remat: Remat = remat

    def head(self) -> Shaped[Array, "D V"]:
        return self.embed_tokens[...].T if self.lm_head is None else self.lm_head[...]

    def logits(self, hidden: Shaped[Array, "*batch D"]) -> Float[Array, "*batch V"]:
        return jnp.matmul(hidden, self.head().astype(hidden.dtype), preferred_element_type=jnp.float32)

    def image_features(self, batch: Batch, key: Key = None) -> Shaped[Array, "B M D"]:
        """Features of every merged patch of every row, M = V / 4."""
        return self.vision(
            batch["patches"],
            batch["patch_positions"],
            batch["patch_segments"],
            batch["windows"],
            batch["window_segments"],
            batch["window_slot"],
            dtype=self.compute_dtype,
            remat=self.remat,
            key=key,
        )

    def embed(self, tokens: Int[Array, "*batch"]) -> Shaped[Array, "*batch D"]:
        table = constrain(self.embed_tokens[...].astype(self.compute_dtype), "vocab", None)
        return along_rows(table[tokens])

    def embed_prompt(
        self, batch: Batch, features: Shaped[Array, "B M D"] | None = None, key: Key = None
    ) -> Shaped[Array, "B L D"]:
        """Token embeddings in which each image token shows its merged patch."""
        hidden, index = self.embed(batch["tokens"]), batch["image_index"]
        if batch["patches"].shape[1] == 0:
            return hidden
        features = self.image_features(batch, key) if features is None else features
        shown = take_rows(features, jnp.maximum(index, 0))
        return along_rows(jnp.where((index >= 0)[..., None], shown.astype(hidden.dtype), hidden))

    def hidden(self, batch: Batch, key: Key = None, *, packed: bool = True) -> Shaped[Array, "B L D"]:
        """Final hidden states, normed; multiply by `head()` for logits. `packed` false: no row holds two examples."""
        embedded = self.embed_prompt(batch, key=key)
        return self.decoder.forward(
            embedded, batch["positions"], batch["segments"], remat=self.remat, key=key, packed=packed
        )
