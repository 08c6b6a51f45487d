"""Stop strings, which no single token id tells (host)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

Decode = Callable[[Sequence[int]], str]


def first_stop(ids: Sequence[int], new: int, stop: Sequence[str], decode: Decode) -> int | None:
    """How many of the tokens it takes until one of the strings stands in their text, given that it takes some of the `new`
    last ones; None while there is none.

    A token is at least one byte, so a string begins at most as many tokens before its end as it has bytes.
    """
    longest = max(len(string.encode()) for string in stop)
    start = max(len(ids) - new - longest, 0)
    if not _any_in(stop, decode(ids[start:])):
        return None
    return next(end for end in range(len(ids) - new + 1, len(ids) + 1) if _any_in(stop, decode(ids[start:end])))


def before_stop(text: str, stop: Sequence[str]) -> str:
    """The text up to the first of the strings."""
    return text[: min((at for at in map(text.find, stop) if at >= 0), default=len(text))]


def _any_in(strings: Sequence[str], text: str) -> bool:
    return any(string in text for string in strings)
