"""Looks at every HTTP request first: identifier, API key, bounds of the body, one log line."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers, MutableHeaders

from vlm_safeguard.server import http_errors
from vlm_safeguard.server.auth import is_trusted
from vlm_safeguard.server.body import check_json
from vlm_safeguard.server.exchange import new_id
from vlm_safeguard.server.http_errors import RequestError
from vlm_safeguard.server.settings import Settings
from vlm_safeguard.server.telemetry import Telemetry

logger = logging.getLogger(__name__)
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_OPEN = frozenset(("/health", "/ready"))  # without a key
# Paths that may stand in the log: others are the client's words.
_PATHS = _OPEN | {"/metrics", "/v1/models", "/v1/chat/completions", "/v1/moderations"}


class Gatekeeper:
    """ASGI middleware. Checks the key before it reads the body, and the whole body before the
    application runs. Paths that need no key have no body. Sets ``state["id"]`` and
    ``state["trusted"]``."""

    def __init__(self, app: Any, settings: Settings, telemetry: Telemetry) -> None:
        self._app, self._settings, self._telemetry = app, settings, telemetry
        self._inside = self._held = 0  # requests, and bytes of their bodies

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            return  # there is nothing else, and no key would be asked for
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        state = scope.setdefault("state", {})
        state["id"] = given if _REQUEST_ID.fullmatch(given) else new_id("req")
        start, status = time.monotonic(), 0

        async def reply(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                told = MutableHeaders(scope=message)
                told["X-Request-Id"] = state["id"]
                told["X-Safeguard-Mode"] = self._settings.mode
                if scope["path"] in _OPEN and _has_body(headers):
                    told["Connection"] = "close"  # nobody reads it
            await send(message)

        try:
            if scope["path"] in _OPEN:  # answered however busy the server is
                state["trusted"] = False
                await self._app(scope, _replay(b"", receive), reply)
            else:
                state["trusted"] = is_trusted(headers, self._settings)
                with self._room() as room:
                    body = await self._body(headers, receive, room)
                    if body:
                        await run_in_threadpool(check_json, body)
                    if body is not None:  # else the client left
                        await self._app(scope, _replay(body, receive), reply)
        except RequestError as error:
            if not status:
                await _refuse(reply, error, self._settings)
        except Exception as error:
            # It ends here, because uvicorn would log its text, which may quote the request.
            logger.error("unexpected error", extra={"error": type(error).__name__})
            if not status:
                await _refuse(reply, http_errors.failed(), self._settings)
        finally:
            path = scope["path"] if scope["path"] in _PATHS else "other"
            self._telemetry.responses.labels(path, status or "none").inc()
            told = {
                "id": state["id"],
                "method": scope["method"],
                "path": path,
                "status": status,
                "seconds": round(time.monotonic() - start, 3),
            }
            logger.info("request", extra=told)

    @contextmanager
    def _room(self) -> Iterator[_Room]:
        """Room for one more request.

        Raises:
            RequestError: there is none.
        """
        if self._inside >= self._settings.inside:
            raise http_errors.too_busy(5)
        self._inside, room = self._inside + 1, _Room()
        try:
            yield room
        finally:
            self._inside -= 1
            self._held -= room.held

    def _hold(self, room: _Room, count: int) -> None:
        """Take so many bytes more of a body.

        Raises:
            RequestError: the bodies of all requests would be too large.
        """
        if self._held + count > self._settings.max_bodies:
            raise http_errors.too_busy(5)
        self._held += count
        room.held += count

    async def _body(self, headers: Headers, receive: Any, room: _Room) -> bytes | None:
        most = self._settings.max_body
        too_large = RequestError(413, f"a request has at most {most} bytes")
        told = headers.get("content-length", "0")
        if told.isdecimal() and int(told[:20]) > most:
            raise too_large
        parts = bytearray()

        async def read() -> bytes | None:
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    return None
                part = message.get("body", b"")
                if len(parts) + len(part) > most:
                    raise too_large
                self._hold(room, len(part))
                parts.extend(part)
                if not message.get("more_body", False):
                    return bytes(parts)

        try:
            return await asyncio.wait_for(read(), self._settings.body_seconds)
        except TimeoutError:
            raise RequestError(408, "the request body did not arrive in time") from None


@dataclass
class _Room:
    """What a request takes up: bytes of its body."""

    held: int = 0


def _has_body(headers: Headers) -> bool:
    return "transfer-encoding" in headers or headers.get("content-length", "0") != "0"


def _replay(body: bytes, receive: Any) -> Any:
    """A ``receive`` that gives a body which was read, then what comes after it."""
    given = False

    async def again() -> Any:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again


async def _refuse(send: Any, error: RequestError, settings: Settings) -> None:
    body = json.dumps(error.body(settings.mode)).encode()
    told = error.headers | {
        "content-type": "application/json",
        "content-length": str(len(body)),
        "connection": "close",  # its body may not have been read
    }
    headers = [(name.lower().encode(), value.encode()) for name, value in told.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
