"""A folder with a tiny guard model, and a chat-completions server."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.evaluation.judges.chat_server import GOOD, Server
from tests.evaluation.judges.guard_model import tiny_llama, tokenizer


@pytest.fixture(scope="module")
def guard_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("guard")
    words = tokenizer()
    words.save_pretrained(folder)
    tiny_llama(len(words)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def running() -> Iterator[Server]:
    server = Server()
    yield server
    server.server.shutdown()
    server.server.server_close()


@pytest.fixture
def server(running: Server, monkeypatch: pytest.MonkeyPatch) -> Server:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    running.play(GOOD)
    return running
