"""What a pool does while its workers are busy; they are threads here, and no Ray is needed."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest

from tests.engines.interrupting import interrupted
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
    pool = Threads()
    begun = interrupted(lambda: pool.map([0, 0, 1, 1, 1]), pool.close)
    assert time.monotonic() - begun < 30
