"""What a pool does while its workers are busy; they are threads here, and no Ray is needed."""

from __future__ import annotations

import os
import signal
import threading
import time
from typing import Any

import pytest

from vlm_safeguard.engines.ray_pool import RayPool


class Threads(RayPool[int, int]):
    """Works on every part that is not 0 until it is closed."""

    def __init__(self) -> None:
        self.actors: list[Any] = [1, 2]
        self._closed = threading.Event()

    def work(self, part: int) -> int:
        if part:
            self._closed.wait(60)
        return part

    def close(self) -> None:
        self._closed.set()


@pytest.mark.usefixtures("interruptible")
def test_an_interrupt_does_not_wait_for_parts_in_progress() -> None:
    pool, found, sent = Threads(), list[int](), 0.0

    def interrupted() -> None:
        nonlocal sent
        try:
            for part in pool.map([0, 0, 1, 1, 1]):
                found.append(part)
                if len(found) == 2:
                    sent = time.monotonic()
                    threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
        finally:
            pool.close()

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert time.monotonic() - sent < 30
    assert found == [0, 0]  # what was finished is there
