"""Sampled tokens as texts (host)."""

from __future__ import annotations

import numpy as np

from sif_jax.models.qwen2_5_vl.chat import ChatProcessor
from sif_jax.rollout.engine import Rollout


def decode_rollout(rollout: Rollout, processor: ChatProcessor) -> list[str]:
    """One text per sample, prompt by prompt, without the stop token."""
    ids, lengths = np.asarray(rollout.ids), np.asarray(rollout.lengths)
    rows = zip(ids.reshape(-1, ids.shape[-1]), lengths.reshape(-1), strict=True)
    return [processor.decode(row[:length]) for row, length in rows]
