"""The model that all pages share; it answers one request at a time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from threading import Event as Flag

from vlm_safeguard.artifact.config import Gate
from vlm_safeguard.data.inputs import Query
from vlm_safeguard.playground.anchors import AnchorMap
from vlm_safeguard.playground.answers import Answerer, Event


@dataclass
class Desk:
    """The model, its guard and the map of the anchors.

    Attributes:
        model, guard: names, to show.
    """

    answerer: Answerer
    anchors: AnchorMap
    model: str
    guard: str
    _turn: asyncio.Lock = field(default_factory=asyncio.Lock)
    # The guarded model belongs to one thread.
    _thread: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "model"))

    @property
    def gates(self) -> list[Gate]:
        return self.answerer.guard.config.gates

    @property
    def busy(self) -> bool:
        """Whether a request is being answered."""
        return self._turn.locked()

    async def ask(self, query: Query, stopped: Flag) -> AsyncIterator[Event]:
        """The events of a request, after those that came before it.

        Args:
            stopped: ends the answers early when it is set.

        Raises:
            SafeguardError: the request cannot be encoded, or the guard cannot do its work.
        """
        loop = asyncio.get_running_loop()
        events: asyncio.Queue[Event | None] = asyncio.Queue()

        def tell(event: Event | None) -> None:
            loop.call_soon_threadsafe(events.put_nowait, event)

        def work() -> None:
            try:
                self.answerer.answer(query, tell, stopped)
            finally:
                tell(None)

        async with self._turn:
            answering = loop.run_in_executor(self._thread, work)
            try:
                while (event := await events.get()) is not None:
                    yield event
            finally:
                stopped.set()
                await answering
