"""Reports progress on stderr."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Sized
from typing import TypeVar

T = TypeVar("T")


class Progress:
    """Counts the steps of named pieces of work. ``quiet`` says nothing."""

    def __init__(self, quiet: bool = False) -> None:
        self.quiet = quiet
        self._began = time.monotonic()
        self._live = sys.stderr.isatty()

    def say(self, message: str) -> None:
        """One line, with the seconds since the start."""
        if not self.quiet:
            seconds = time.monotonic() - self._began
            print(
                f"\r[{seconds:5.0f} s] {message}\033[K"
                if self._live
                else f"[{seconds:5.0f} s] {message}",
                file=sys.stderr,
                flush=True,
            )

    def track(self, items: Iterable[T], what: str) -> Iterator[T]:
        """Yield ``items`` while counting them."""
        total = len(items) if isinstance(items, Sized) else None
        last = time.monotonic()
        for count, item in enumerate(items, 1):
            yield item
            now = time.monotonic()
            done = total is not None and count == total
            if self.quiet or not (done or now - last > (0.2 if self._live else 10)):
                continue
            last = now
            text = f"[{now - self._began:5.0f} s] {what}: {count}" + (f"/{total}" if total else "")
            if self._live and not done:
                print(f"\r{text}\033[K", end="", file=sys.stderr, flush=True)
            else:
                print(f"\r{text}\033[K" if self._live else text, file=sys.stderr, flush=True)
