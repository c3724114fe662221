"""Starts a server on a tiny checkpoint, under a guard that opens for everybody."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import uvicorn

from tests import tiny
from tests.server.witness import Witness
from vlm_safeguard.guard import Guard
from vlm_safeguard.model.loading import load
from vlm_safeguard.server.app import create_app
from vlm_safeguard.server.audit import AuditLog
from vlm_safeguard.server.listen import uvicorn_config
from vlm_safeguard.server.settings import Settings
from vlm_safeguard.server.telemetry import Telemetry
from vlm_safeguard.server.transformers_engine import TransformersEngine
from vlm_safeguard.utils.network import listen

MODEL = "tiny"
STEERED = (2, 4)


def open_guard(model: Any, threshold: float = -1e9) -> Guard:
    """Opens for every request, and changes the stream of each, with a picture or without, and with
    words or without: a text gate stays shut for a picture without words."""
    gates = [tiny.gate(source, 1, threshold=threshold) for source in ("text", "vlm")]
    return tiny.guard(model, gates, layers=list(STEERED), reference="anchor")


@dataclass
class Live:
    """A server that runs. ``client`` speaks to it; ``port`` is for raw sockets."""

    engine: TransformersEngine
    witness: Witness
    server: uvicorn.Server
    client: httpx.Client
    port: int
    audit: Path | None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def chat(self, content: Any = "hi", headers: Any = None, **fields: Any) -> httpx.Response:
        """One request to the chat API with a user's message."""
        body = {"model": MODEL, "messages": [{"role": "user", "content": content}]}
        body |= {"max_tokens": 4} | fields
        return self.client.post("/v1/chat/completions", json=body, headers=headers)

    def idle(self, seconds: float = 10.0) -> bool:
        """Wait until nothing is generated and nobody waits. False if that takes longer."""
        return wait_until(lambda: not self.engine.busy and not self.engine.waiting, seconds)


def wait_until(true: Any, seconds: float = 10.0) -> bool:
    """Poll ``true`` until it holds. False if that takes longer than ``seconds``."""
    end = time.monotonic() + seconds
    while not true():
        if time.monotonic() > end:
            return False
        time.sleep(0.01)
    return True


@contextmanager
def serving(
    folder: Path,
    audit: Path | None = None,
    audit_content: bool = True,
    reads_pictures: bool = False,
    **settings: Any,
) -> Iterator[Live]:
    """A server on the checkpoint in ``folder``; ``settings`` as in ``Settings``."""
    loaded = load(folder)
    guard = tiny.changed(open_guard(loaded.model), reads_pictures=reads_pictures)
    witness = Witness(loaded.model, STEERED)
    chosen: dict[str, Any] = {
        "model": MODEL, "deadline": 20.0, "max_tokens": 1500, "default_tokens": 4,
        "check_every": 3600.0, "max_prompt_tokens": 1000,
    }  # fmt: skip
    engine = TransformersEngine(loaded, guard, Settings(**chosen | settings), Telemetry())
    engine.start()
    witness.reset()  # the self-check asked with a guard that only watches
    app = create_app(engine, AuditLog(audit, audit_content) if audit else None)
    server = uvicorn.Server(uvicorn_config(app, engine.settings))
    listener = listen("127.0.0.1", 0)
    run = partial(server.run, sockets=[listener])
    thread = threading.Thread(target=run, name="http", daemon=True)
    thread.start()
    assert wait_until(lambda: server.started)
    port = listener.getsockname()[1]
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30) as client:
        try:
            yield Live(engine, witness, server, client, port, audit)
        finally:
            server.should_exit = True
            thread.join(30)
