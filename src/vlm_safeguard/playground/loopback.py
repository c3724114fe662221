"""Keeps the playground on this machine: who may ask, and what the page may load."""

from __future__ import annotations

import socket
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any
from urllib.parse import urlsplit

from vlm_safeguard.errors import SafeguardError

HOSTS = ("127.0.0.1", "::1", "localhost")
# The page's library compiles its templates in the browser, hence 'unsafe-eval'.
_POLICY = (
    "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; connect-src 'self' ws:; "
    "form-action 'self'; frame-ancestors 'none'; base-uri 'self'"
)
_Message = MutableMapping[str, Any]
_App = Callable[..., Awaitable[None]]


def listen(host: str, port: int) -> socket.socket:
    """A listening socket on loopback.

    Args:
        port: 0 takes a free one.

    Raises:
        SafeguardError: ``host`` is not loopback, or the port cannot be taken.
    """
    if host not in HOSTS:
        raise SafeguardError(
            f"{host} is not loopback: the playground shows unguarded answers and is for this "
            "machine only (`vlm-safeguard serve` is for others)"
        )
    family = socket.AF_INET6 if host == "::1" else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except OSError as error:
        raise SafeguardError(
            f"cannot listen on port {port} of {host}: {error.strerror or error}. Choose another "
            "with --port, or 0 for a free one"
        ) from error


class LoopbackOnly:
    """ASGI middleware that refuses requests under another host name, or from another site's page.

    A site can lead its own name to 127.0.0.1, and any page may open a WebSocket to it. Responses
    get a policy that lets the page load nothing from elsewhere.
    """

    def __init__(self, app: _App) -> None:
        self._app = app

    async def __call__(self, scope: _Message, receive: _App, send: _App) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        headers = {name.lower(): value.decode("latin-1") for name, value in scope["headers"]}
        if not _ours(headers.get(b"host", ""), headers.get(b"origin")):
            await _refuse(scope["type"], send)
            return

        async def send_with_policy(message: _Message) -> None:
            if message["type"] == "http.response.start":
                policy = (b"content-security-policy", _POLICY.encode())
                message["headers"] = [*message.get("headers", ()), policy]
            await send(message)

        await self._app(scope, receive, send_with_policy)


def _ours(host: str, origin: str | None) -> bool:
    try:
        own = urlsplit(f"//{host}")
        if own.hostname not in HOSTS:
            return False
        return origin is None or urlsplit(origin).netloc == own.netloc
    except ValueError:  # no address at all
        return False


async def _refuse(kind: str, send: _App) -> None:
    if kind == "websocket":
        await send({"type": "websocket.close", "code": 1008})
        return
    await send({"type": "http.response.start", "status": 403, "headers": []})
    await send({"type": "http.response.body", "body": b"The playground is for this machine only."})
