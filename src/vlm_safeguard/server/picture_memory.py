"""Keeps the decoded pictures of a batch within the memory that they may take."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from anyio.to_thread import run_sync

from vlm_safeguard.server.conversation import Conversation, Takes, read_messages
from vlm_safeguard.server.schema import Message
from vlm_safeguard.server.settings import Settings


class PictureMemory:
    """Decodes the pictures of one request after the other, while there is room for more.

    How large pictures are is known when they are decoded. So ``max_pixels`` is exceeded by those of
    one request at most, and a request always fits.

    Args:
        max_pixels: of all pictures that are decoded and still in use, 3 bytes each.
    """

    def __init__(self, max_pixels: int) -> None:
        self._most, self._held = max_pixels, 0
        self._turn = asyncio.Lock()
        self._freed = asyncio.Event()

    @asynccontextmanager
    async def conversation(
        self, messages: Sequence[Message], settings: Settings, takes: Takes
    ) -> AsyncIterator[Conversation]:
        """``read_messages``, as soon as there is room; the room is free again when the block ends.

        Raises:
            RequestError: see ``read_messages``.
        """
        async with self._turn:
            while self._held >= self._most:
                self._freed.clear()
                await self._freed.wait()
            read = await run_sync(read_messages, messages, settings, takes)
            self._held += read.pixels
        try:
            yield read
        finally:
            self._held -= read.pixels
            self._freed.set()
