"""Awaits a thread's answer in a coroutine."""

from __future__ import annotations

import asyncio
from concurrent.futures import Future
from typing import TypeVar

import anyio

_Answer = TypeVar("_Answer")


async def answer_of(given: Future[_Answer]) -> _Answer:
    """The answer once it is there, or its error. Cancelled where nobody waits for it any more,
    unless work on it has begun."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:  # inspect runs on trio, which cannot wait for a thread's future
        try:
            while not given.done():
                await anyio.sleep(0.02)
        finally:
            given.cancel()
        return given.result()
    return await asyncio.wrap_future(given)
