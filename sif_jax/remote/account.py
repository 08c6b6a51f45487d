"""What calls to a remote model came to: how many, how they failed, tokens and cost, and the cap on them (host)."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from typing import Any

from sif_jax.config import RemoteConfig


@dataclasses.dataclass
class Account:
    calls: int = 0  # requests sent
    cached: int = 0  # replies from disk
    retries: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost: float = 0.0
    failures: dict[str, int] = dataclasses.field(default_factory=dict)  # by reason; of the last attempt

    def fail(self, reason: str) -> None:
        self.failures[reason] = self.failures.setdefault(reason, 0) + 1

    def charge(self, prompt_tokens: int, completion_tokens: int, config: RemoteConfig) -> None:
        self.prompt_tokens += prompt_tokens
        self.completion_tokens += completion_tokens
        self.cost += (prompt_tokens * config.prompt_price + completion_tokens * config.completion_price) / 1e6

    def cap_reached(self, config: RemoteConfig) -> str | None:
        """The cap that leaves nothing to spend, as its key."""
        if config.max_cost is not None and self.cost >= config.max_cost:
            return "max_cost"
        if config.max_total_tokens is not None and self.tokens >= config.max_total_tokens:
            return "max_total_tokens"
        return None

    @property
    def tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens

    def state(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def set_state(self, state: Mapping[str, Any]) -> None:
        for field in dataclasses.fields(self):
            setattr(self, field.name, copy.copy(state[field.name]))

    def counters(self) -> dict[str, float]:
        """The flat form: one number per name."""
        state = self.state()
        failures = {f"failed/{reason}": count for reason, count in sorted(state.pop("failures").items())}
        return {name: float(value) for name, value in (state | failures).items()}
