"""When to ask again: which answers of a server pass, and how long to wait (host)."""

from __future__ import annotations

import random
import re
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

from sif_jax.config import RemoteConfig

_PASSING = frozenset({408, 409, 425, 429})


def is_passing(status: int) -> bool:
    """Whether the same request may fare better later."""
    return status in _PASSING or status >= 500


def backoff_s(attempt: int, config: RemoteConfig) -> float:
    """Exponential in the number of the failed attempt, from 0; jittered by half, so that many callers spread out."""
    return min(config.max_wait_s, config.backoff_s * 2.0 ** min(attempt, 30)) * random.uniform(0.5, 1.0)


def retry_after_s(header: str | None, now: datetime) -> float | None:
    """A Retry-After header, in seconds or as an HTTP date, as seconds from now; None if there is none to be read."""
    if header is None:
        return None
    if re.fullmatch(r"[0-9]+(\.[0-9]+)?", header):
        return float(header)
    try:
        moment = parsedate_to_datetime(header)
    except (ValueError, OverflowError):
        return None
    moment = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
    return max(0.0, (moment - now).total_seconds())
