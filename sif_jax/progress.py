"""How far a long loop is, and when it will end (io)."""

from __future__ import annotations

import io
import math
import sys
import time
from typing import Any, SupportsFloat

from tqdm import tqdm


class Progress:
    """A bar on a terminal; elsewhere (a log file, CI) a line now and then."""

    def __init__(
        self,
        description: str,
        total: int,
        *,
        start: int = 0,
        shown: bool = True,
        stream: io.TextIOBase | None = None,
        line_every_s: float = 30.0,
    ) -> None:
        self._stream: Any = stream or sys.stderr
        is_terminal = shown and self._stream.isatty()
        self._bar = tqdm(total=total, initial=start, desc=description, file=self._stream) if is_terminal else None
        self._shown = shown
        self._description, self._total, self._start, self._done = description, total, start, start
        self._line_every_s = line_every_s if shown else math.inf
        self._began = self._last_line = time.monotonic()

    def advance(self, steps: int = 1, **shown: SupportsFloat) -> None:
        self._done += steps
        text = "  ".join(f"{name} {float(value):.4g}" for name, value in shown.items())
        if self._bar:
            self._bar.set_postfix_str(text, refresh=False)
            self._bar.update(steps)
            return
        now = time.monotonic()
        if now - self._last_line >= self._line_every_s or (self._done >= self._total and self._shown):
            self._last_line = now
            remaining = (now - self._began) / (self._done - self._start) * (self._total - self._done)
            eta = tqdm.format_interval(remaining)
            line = f"{self._description}: {self._done}/{self._total}  ETA {eta}  {text}"
            print(line.rstrip(), file=self._stream, flush=True)

    def close(self) -> None:
        if self._bar:
            self._bar.close()
