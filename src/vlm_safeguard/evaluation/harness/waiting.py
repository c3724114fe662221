"""Awaits a thread's answer in a coroutine."""

from __future__ import annotations

from concurrent.futures import Future
from typing import TypeVar

import anyio

_Answer = TypeVar("_Answer")


async def answer_of(given: Future[_Answer]) -> _Answer:
    """The answer once it is there, or its error. Cancelled where nobody waits for it any more,
    unless work on it has begun."""
    try:
        while not given.done():
            await anyio.sleep(0.02)
    finally:
        given.cancel()
    return given.result()
