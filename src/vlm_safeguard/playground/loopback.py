"""Keeps the playground on this machine: who may ask, and what the page may load."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from vlm_safeguard.utils.network import asked_from_here

# The page's library compiles its templates in the browser, hence 'unsafe-eval'.
_POLICY = (
    "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; connect-src 'self' ws:; "
    "form-action 'self'; frame-ancestors 'none'; base-uri 'self'"
)
_Message = MutableMapping[str, Any]
_App = Callable[..., Awaitable[None]]


class LoopbackOnly:
    """ASGI middleware that refuses requests under another host name, or from another site's page.

    Responses get a policy that lets the page load nothing from elsewhere.
    """

    def __init__(self, app: _App) -> None:
        self._app = app

    async def __call__(self, scope: _Message, receive: _App, send: _App) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        headers = {name.lower(): value.decode("latin-1") for name, value in scope["headers"]}
        if not asked_from_here(headers.get(b"host", ""), headers.get(b"origin")):
            await _refuse(scope["type"], send)
            return

        async def send_with_policy(message: _Message) -> None:
            if message["type"] == "http.response.start":
                policy = (b"content-security-policy", _POLICY.encode())
                message["headers"] = [*message.get("headers", ()), policy]
            await send(message)

        await self._app(scope, receive, send_with_policy)


async def _refuse(kind: str, send: _App) -> None:
    if kind == "websocket":
        await send({"type": "websocket.close", "code": 1008})
        return
    await send({"type": "http.response.start", "status": 403, "headers": []})
    await send({"type": "http.response.body", "body": b"The playground is for this machine only."})
