"""Looks at every HTTP request first: identifier, API key, bounds of the body, one log line."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import time
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers, MutableHeaders

from vlm_safeguard.server import http_errors
from vlm_safeguard.server.auth import is_trusted
from vlm_safeguard.server.body import check_json
from vlm_safeguard.server.exchange import new_id
from vlm_safeguard.server.http_errors import RequestError
from vlm_safeguard.server.settings import Settings

logger = logging.getLogger(__name__)
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_OPEN = frozenset(("/health", "/ready"))  # without a key
# Paths that may stand in the log: others are the client's words.
_PATHS = _OPEN | {"/metrics", "/v1/models", "/v1/chat/completions", "/v1/moderations"}


class Gatekeeper:
    """ASGI middleware. Checks the key before it reads the body, and the whole body before the
    application runs. Sets ``state["id"]`` and ``state["trusted"]``."""

    def __init__(self, app: Any, settings: Settings) -> None:
        self._app, self._settings = app, settings
        self._inside = 0

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
                MutableHeaders(scope=message)["X-Request-Id"] = state["id"]
            await send(message)

        self._inside += 1
        try:
            if scope["path"] in _OPEN:  # answered however busy the server is
                state["trusted"] = False
            else:
                state["trusted"] = is_trusted(headers, self._settings)
                if self._inside > self._settings.inside:
                    raise http_errors.too_busy(5)
            body = await self._body(headers, receive)
            if body:
                await run_in_threadpool(check_json, body)
            if body is not None:  # else the client left
                await self._app(scope, _replay(body, receive), reply)
        except RequestError as error:
            if not status:
                await _refuse(reply, error)
        except Exception as error:
            # It ends here, because uvicorn would log its text, which may quote the request.
            logger.error("unexpected error", extra={"error": type(error).__name__})
            if not status:
                await _refuse(reply, http_errors.failed())
        finally:
            self._inside -= 1
            told = {
                "id": state["id"],
                "method": scope["method"],
                "path": scope["path"] if scope["path"] in _PATHS else "other",
                "status": status,
                "seconds": round(time.monotonic() - start, 3),
            }
            logger.info("request", extra=told)

    async def _body(self, headers: Headers, receive: Any) -> bytes | None:
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
                parts.extend(message.get("body", b""))
                if len(parts) > most:
                    raise too_large
                if not message.get("more_body", False):
                    return bytes(parts)

        try:
            return await asyncio.wait_for(read(), self._settings.body_seconds)
        except TimeoutError:
            raise RequestError(408, "the request body did not arrive in time") from None


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


async def _refuse(send: Any, error: RequestError) -> None:
    body = json.dumps(error.body).encode()
    told = error.headers | {
        "content-type": "application/json",
        "content-length": str(len(body)),
        "connection": "close",  # its body may not have been read
    }
    headers = [(name.lower().encode(), value.encode()) for name, value in told.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
