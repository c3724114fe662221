"""Fetching public sets, from a stand-in on this machine that serves files of our own."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from vlm_safeguard.errors import DataError
from vlm_safeguard.evaluation.benchmarks import BENCHMARKS, load_benchmark, published

TABLE = b'{"image_url": "", "question": "What is this?"}\n'
FILES = {
    "/o/r/abc/MM-HarmfulBench/mm_harmful.jsonl": TABLE,
    "/o/r/abc/MM-HarmfulBench/images/0.jpg": b"a picture",
}


@dataclass
class Publisher:
    files: dict[str, bytes] = field(default_factory=lambda: dict(FILES))
    cut: int = 0  # bytes announced and not sent
    asked: list[str] = field(default_factory=list)


@pytest.fixture
def publisher(monkeypatch: pytest.MonkeyPatch) -> Iterator[Publisher]:
    state = Publisher()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            state.asked.append(self.path)
            data = state.files.get(self.path)
            if data is None:
                self.send_error(404)
                return
            self.send_response(200)
            self.send_header("Content-Length", str(len(data) + state.cut))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: Any) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(published, "SERVER", f"http://127.0.0.1:{server.server_port}")
    source = published.Source(
        "o/r",
        "abc",
        {"MM-HarmfulBench/mm_harmful.jsonl": hashlib.sha256(TABLE).hexdigest()},
        ("MM-HarmfulBench/images/0.jpg",),
    )
    monkeypatch.setitem(published.SOURCES, "mm_harmful_bench", source)
    yield state
    server.shutdown()
    server.server_close()


def test_a_set_is_fetched_once_and_can_be_read(
    publisher: Publisher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLM_SAFEGUARD_CACHE", str(tmp_path))
    folder = published.folder_of("mm_harmful_bench", "hub")
    [prompt] = load_benchmark("mm_harmful_bench", folder)
    assert prompt.prompt == "What is this?" and prompt.picture is not None
    assert sorted(publisher.asked) == sorted(FILES)
    assert published.folder_of("mm_harmful_bench", "hub") == folder
    assert len(publisher.asked) == len(FILES)  # from the cache


@pytest.mark.parametrize(
    ("path", "data", "cut", "message"),
    [
        ("images/0.jpg", None, 0, "0.jpg answered 404"),
        ("images/0.jpg", b"", 0, "broke off after 0 bytes"),
        ("images/0.jpg", b"half", 5, "broke off after 4 bytes|IncompleteRead"),
        ("images/0.jpg", b"x" * 2000, 0, "larger than 1000 bytes"),
        ("mm_harmful.jsonl", b"{}", 0, "has SHA-256 .*, expected"),
    ],
)
def test_what_is_not_whole_leaves_nothing_behind(
    path: str,
    data: bytes | None,
    cut: int,
    message: str,
    publisher: Publisher,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(published, "MAX_BYTES", 1000)
    name = f"/o/r/abc/MM-HarmfulBench/{path}"
    if data is None:
        del publisher.files[name]
    else:
        publisher.files[name] = data
    if cut:  # the table first, whole: only the picture breaks off
        monkeypatch.setitem(
            published.SOURCES,
            "mm_harmful_bench",
            published.Source("o/r", "abc", {}, (name.removeprefix("/o/r/abc/"),)),
        )
        publisher.cut = cut
    with pytest.raises(DataError, match=f"(?s)({message}).*--data"):
        published.fetch("mm_harmful_bench", tmp_path)
    assert list((tmp_path / "benchmarks").iterdir()) == []


def test_without_a_network_the_address_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(published, "SERVER", "http://127.0.0.1:9")
    with pytest.raises(DataError, match=r"cannot fetch http://127.0.0.1:9/.*check the network"):
        published.fetch("malicious_instruct", tmp_path)


def test_only_what_is_asked_for_by_name_is_fetched(tmp_path: Path) -> None:
    assert published.folder_of("own_malicious", "hub") is None
    assert published.folder_of("xstest", None) is None
    assert published.folder_of("xstest", str(tmp_path)) == tmp_path
    with pytest.raises(DataError, match="xstest is not fetched: only malicious_instruct"):
        published.folder_of("xstest", "hub")


def test_every_source_is_of_the_publisher_and_holds_what_its_reader_wants() -> None:
    for name, source in published.SOURCES.items():
        assert BENCHMARKS[name].publisher.endswith(source.repository)
        assert len(source.commit) == 40 and source.tables
        assert all(len(digest) == 64 for digest in source.tables.values())
