"""The log on stderr: plain lines, and on a terminal a counter for what takes longer than two seconds."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

PATIENCE_S = 2.0
REDRAW_S = 0.2


class Log:
    """Says nothing if quiet."""

    def __init__(self, quiet: bool = False) -> None:
        self.quiet = quiet

    def say(self, text: str) -> None:
        if not self.quiet:
            shown = "".join(letter if letter.isprintable() else "?" for letter in text)  # names come from files
            print(f"phasewise: {shown}", file=sys.stderr)

    @contextmanager
    def counting(self, what: str) -> Iterator[Callable[[int], None] | None]:
        """Gives a function to call with the number of finished requests, or None where nobody watches."""
        if self.quiet or not sys.stderr.isatty():
            yield None
            return
        counter = _Counter(what)
        try:
            yield counter.show
        finally:
            counter.wipe()


class _Counter:
    def __init__(self, what: str) -> None:
        self.what = what
        self.started_s = self.drawn_s = time.monotonic()
        self.drawn = False

    def show(self, finished: int) -> None:
        now_s = time.monotonic()
        if now_s - self.started_s < PATIENCE_S or now_s - self.drawn_s < REDRAW_S:
            return
        self.drawn, self.drawn_s = True, now_s
        rate = finished / (now_s - self.started_s)
        print(f"\r\033[K{self.what}: {finished:,} requests, {rate:,.0f}/s", end="", file=sys.stderr, flush=True)

    def wipe(self) -> None:
        if self.drawn:
            print("\r\033[K", end="", file=sys.stderr, flush=True)
