"""What a layer keeps for its backward pass, by name (pure)."""

from __future__ import annotations

from typing import Literal

import jax

Remat = Literal["none", "dots", "full"]

REMAT_POLICIES = {
    "none": lambda body: body,
    "dots": lambda body: jax.checkpoint(body, policy=jax.checkpoint_policies.dots_with_no_batch_dims_saveable),
    "full": jax.checkpoint,
}
