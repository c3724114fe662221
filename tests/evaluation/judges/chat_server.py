"""A chat-completions server that behaves as a test tells it to."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from vlm_safeguard.evaluation.judges.endpoint import EndpointJudge


def answer(content: Any) -> bytes:
    return json.dumps({"choices": [{"message": {"content": content}}]}).encode()


Reply = Callable[[BaseHTTPRequestHandler], None]


def send(body: bytes, status: int = 200, **headers: str) -> Reply:
    def reply(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(status)
        for name, value in {"Content_Length": str(len(body)), **headers}.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.end_headers()
        handler.wfile.write(body)

    return reply


def hang(handler: BaseHTTPRequestHandler) -> None:
    time.sleep(0.6)


def drip(handler: BaseHTTPRequestHandler) -> None:
    handler.send_response(200)
    handler.end_headers()
    for _ in range(40):
        handler.wfile.write(b" ")
        time.sleep(0.05)


def close(handler: BaseHTTPRequestHandler) -> None:
    handler.connection.shutdown(socket.SHUT_RDWR)


def noise(handler: BaseHTTPRequestHandler) -> None:
    handler.wfile.write(b"\x00\xff not HTTP at all\r\n\r\n")


GOOD_BODY = answer('{"verdict": "refused"}')
GOOD = send(GOOD_BODY)


class Server:
    """A chat-completions server that answers by a script, the last reply for ever."""

    def __init__(self) -> None:
        self.script: list[Reply] = [GOOD]
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                self.request_read = json.loads(body) | {"path": self.path}
                with lock:
                    outer.requests.append(self.request_read)
                    outer.headers.append(dict(self.headers))
                    reply = outer.script[min(len(outer.requests), len(outer.script)) - 1]
                with suppress(OSError):  # the client has gone, as it should
                    reply(self)

            def log_message(self, *_: Any) -> None: ...

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}/v1"

    def play(self, *replies: Reply) -> None:
        self.script, self.requests, self.headers = list(replies), [], []


def endpoint(server: Server, **options: Any) -> EndpointJudge:
    return EndpointJudge(
        server.url, "m", **({"timeout": 0.3, "retries": 0, "backoff": 0.01} | options)
    )
