"""What `decode` does to rows, without a model: every token is 7 until a sample's length is reached, then the stop token."""

import numpy as np

from sif_jax.rollout.schedule import Emitted, Rows

STOP = 1


def decode(rows: Rows, lengths: dict[tuple[int, ...], int], max_steps: int) -> Emitted:
    """`lengths` tells how long the sample of each key becomes."""
    lanes = len(rows.patience)
    count, live, occupied = rows.lengths.copy(), rows.limits > 0, rows.limits > 0
    tokens = np.full((len(count), 1 + max_steps), -1, np.int32)
    ends = np.array([lengths.get(tuple(key.tolist()), 0) for key in rows.keys])

    def choose(where: np.ndarray, column: int) -> None:
        count[where] += 1
        tokens[where, column] = np.where(count == ends, STOP, 7)[where]
        live[where] = ((count < ends) & (count < rows.limits))[where]

    choose(live & (rows.lengths == 0), 0)
    steps = 0
    while (
        steps < max_steps
        and ((occupied & ~live).reshape(lanes, -1).sum(-1) < rows.patience).all()
        and live.reshape(lanes, -1).sum(-1).max() > rows.shrink_at
    ):
        steps += 1
        choose(live.copy(), steps)
    return Emitted(tokens, np.where(tokens >= 0, -0.5, 0.0).astype(np.float32), count, np.int32(steps))
