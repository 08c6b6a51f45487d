"""Run a stack of layers, keeping for the backward pass what a named policy says (pure)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import jax

Remat = Literal["none", "dots", "full"]

# What is kept of a layer is told by name: what its linear layers put out, adapter included; what comes between an adapter's
# factors; what attention in plain JAX needs for its gradient. What cuDNN's needs has no such name, but its operation has one.
LINEAR, LOW_RANK, ATTENTION = "linear", "low_rank", "attention"
CUDNN_ATTENTION = "dot_product_attention_fwd"
_named = jax.checkpoint_policies.save_only_these_names(LINEAR, LOW_RANK, ATTENTION)


def _keep_products(primitive: Any, *values: Any, **parameters: Any) -> Any:
    return primitive.name.startswith(CUDNN_ATTENTION) or _named(primitive, *values, **parameters)


# What is kept of each layer: everything; its input and its named results, so that other attention and the elementwise work
# are done again (MaxText's "minimal"); its input. Costs in docs/results/remat.md, by `sif-jax bench remat`. Keeping all
# but the feed-forward's wide ones lies on the line between dots and full, so it is not offered.
REMAT_POLICIES = {
    "none": lambda body: body,
    "dots": lambda body: jax.checkpoint(body, policy=_keep_products),
    "full": jax.checkpoint,
}
# A short stack is written out: nothing is copied in and out of stacked residuals, for a fifth less time on CPU. A long one
# is a loop, so that compile time does not grow with depth.
UNROLLED_LAYERS = 8


def scan_layers(
    body: Callable[..., Any], carry: Any, layers: Any, *, remat: Remat = "none", scan: bool = True
) -> tuple[Any, Any]:
    """`jax.lax.scan` over the leading axis of `layers`, or without `scan` the layers written out, however many."""
    count = jax.tree.leaves(layers)[0].shape[0]
    unroll = 1 if scan and count > UNROLLED_LAYERS else count
    return jax.lax.scan(REMAT_POLICIES[remat](body), carry, layers, unroll=unroll)
