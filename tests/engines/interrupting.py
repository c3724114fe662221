"""An interrupt in the midst of a pool's work."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator

import pytest


def interrupted(work: Callable[[], Iterator[int]], close: Callable[[], None]) -> float:
    """Interrupt ``work`` soon after it has given 0 twice, and ``close`` then. What was finished is
    there. Returns the time of the second."""
    found: list[int] = []
    begun = 0.0

    def run() -> None:
        nonlocal begun
        try:
            for part in work():
                found.append(part)
                if len(found) == 2:
                    begun = time.monotonic()
                    threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGINT)).start()
        finally:
            close()

    with pytest.raises(KeyboardInterrupt):
        run()
    assert found == [0, 0]
    return begun
