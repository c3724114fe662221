"""Speaks to a server byte by byte."""

from __future__ import annotations

import json
import re
import socket
from pathlib import Path
from typing import Any

import httpx

# What an error may never tell: heap addresses, paths, modules and exceptions of libraries.
HERE = re.escape(str(Path(__file__).resolve().parents[2]))
LEAKS = re.compile(
    r"(?<!\d)0x[0-9a-f]{6,}|/root/|/home/|/tmp/|site-packages|\.py\b|Traceback|Error\(|Exception"
    rf"|{HERE}|pydantic|PIL|torch|jinja|transformers|Processor|errno|line \d+ column"
)


def assert_clear(answer: httpx.Response, *statuses: int) -> dict[str, Any]:
    """A refusal in OpenAI's form that tells nothing of the inside. Returns its error."""
    assert answer.status_code in (statuses or range(400, 500)), answer.text[:500]
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["code"] == answer.status_code
    assert answer.json()["safeguard"] == {"status": "rejected", "mode": "enforce"}
    assert not LEAKS.search(answer.text), answer.text[:500]
    assert len(answer.content) < 2000
    assert answer.headers["x-safeguard-status"] == "rejected"
    assert answer.headers["x-safeguard-mode"] == "enforce"
    assert answer.headers["x-request-id"]
    return error


def post(live: Any, body: bytes, **headers: str) -> httpx.Response:
    """Bytes to the chat API as they are."""
    told = {"content-type": "application/json"} | {
        name.replace("_", "-"): value for name, value in headers.items()
    }
    return live.client.post("/v1/chat/completions", content=body, headers=told)


def connect(live: Any, timeout: float = 15.0) -> socket.socket:
    return socket.create_connection(("127.0.0.1", live.port), timeout=timeout)


def head(length: int, *more: str, path: str = "/v1/chat/completions") -> bytes:
    """Request line and headers of a POST."""
    lines = [f"POST {path} HTTP/1.1", "Host: localhost", "Content-Type: application/json"]
    return "\r\n".join([*lines, f"Content-Length: {length}", *more, "", ""]).encode()


def chat_bytes(**fields: Any) -> bytes:
    """Body of a chat request."""
    return json.dumps(
        {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2} | fields
    ).encode()


def read_all(connection: socket.socket) -> bytes:
    """What comes until the server closes; or until the socket's timeout, as TimeoutError."""
    found = bytearray()
    try:
        while chunk := connection.recv(65536):
            found += chunk
    except ConnectionResetError:
        pass
    return bytes(found)


def status_of(answer: bytes) -> int:
    """The status of the first response in ``answer``."""
    return int(answer.split(b" ", 2)[1])
