"""Limits on connections that uvicorn does not set itself."""

from __future__ import annotations

import asyncio
from typing import Any

import h11
import uvicorn
from sse_starlette.sse import AppStatus
from uvicorn.protocols.http.h11_impl import H11Protocol

from vlm_safeguard.server.settings import Settings

_HEADER_SECONDS = 10.0
_MAX_HEADERS = 65_536  # bytes of the headers of a request


class PromptHeaders(H11Protocol):
    """Closes a connection whose request line and headers do not arrive in time, and one that is
    open beside ``most`` others."""

    most: int
    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._start_timer()
        if len(self.connections) > self.most:
            self.transport.close()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._look()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._look()  # a part of the next request may be here already

    def _look(self) -> None:
        if self.conn.their_state is not h11.IDLE:
            self._stop_timer()
        elif self._timer is None and self.conn.trailing_data[0]:
            self._start_timer()  # at the first byte of a request

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        super().connection_lost(exc)

    def _start_timer(self) -> None:
        self._timer = self.loop.call_later(_HEADER_SECONDS, self.transport.close)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


def uvicorn_config(app: Any, settings: Settings) -> uvicorn.Config:
    """The configuration of uvicorn for the application. The socket is given to ``run``."""
    # Else sse_starlette cuts every stream short when the server is told to stop. They end at their
    # deadline.
    AppStatus.disable_automatic_graceful_drain()
    # A server that was stopped earlier in this process leaves this set, which cuts streams too.
    AppStatus.should_exit = False
    return uvicorn.Config(
        app,
        # The gatekeeper answers at settings.inside. This only bounds open connections.
        http=type("BoundedHeaders", (PromptHeaders,), {"most": 8 * settings.inside}),
        h11_max_incomplete_event_size=_MAX_HEADERS,
        ws="none",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=10,
        timeout_graceful_shutdown=int(settings.deadline) + 10,
    )
