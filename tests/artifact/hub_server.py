"""A stand-in for a model hub: the few endpoints that huggingface_hub needs, over a local server."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit


@dataclass
class Repository:
    """Commits, each a whole set of files, and the branches that point at them."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    private: bool | None = None
    gated: bool = False

    def commit(self, files: dict[str, bytes], branch: str = "main") -> str:
        whole = self.files(branch) | files if branch in self.branches else dict(files)
        facts = [str(len(self.commits)), *(f"{name}{data!r}" for name, data in whole.items())]
        name = hashlib.sha1("".join(facts).encode()).hexdigest()
        self.commits[name], self.branches[branch] = whole, name
        return name

    def resolve(self, revision: str) -> str | None:
        return revision if revision in self.commits else self.branches.get(revision)

    def files(self, revision: str) -> dict[str, bytes]:
        return self.commits[self.branches.get(revision, revision)]


class Hub:
    """The server's state. ``requests`` keeps every request as (method, path)."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.requests: list[tuple[str, str]] = []
        self.tokens: list[str | None] = []
        self.writers: set[str] | None = None  # tokens that may write; None: everybody
        self.status: int | None = None  # answer everything with this
        self.delay = 0.0  # seconds before each answer
        self.torn = False  # send half of every file
        self.sizes: dict[str, int] = {}  # sizes stated instead of the true ones
        self.moves: list[tuple[str, dict[str, bytes]]] = []  # commits between look-up and fetch
        self.endpoint = ""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_: object) -> None:
        pass

    def answer(
        self, status: int, body: bytes | dict | list, headers: dict[str, str] | None = None
    ) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        headers = {"Content-Length": str(len(data))} | (headers or {})
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            if self.hub.torn and "ETag" in headers:
                data, self.close_connection = data[: len(data) // 2], True
            self.wfile.write(data)

    def fail(self, status: int, code: str) -> None:
        self.answer(status, {"error": code}, {"X-Error-Code": code})

    def handle_any(self) -> None:
        hub, path = self.hub, unquote(urlsplit(self.path).path)
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length)
        hub.requests.append((self.command, path))
        hub.tokens.append(self.headers.get("Authorization"))
        time.sleep(hub.delay)
        if hub.status is not None:
            self.answer(hub.status, {"error": "told to"})
        elif path == "/api/repos/create":
            self.create(json.loads(body))
        elif path == "/api/validate-yaml":
            self.answer(200, {"errors": [], "warnings": []})
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/preupload/(.+)", path):
            self.preupload(found[1], found[2], json.loads(body))
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/(.+)", path):
            self.commit(found[1], found[2], body)
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", path):
            self.info(found[1], found[2] or "main")
        elif found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/(.+)/([^/]+)", path):
            self.file(found[1], found[2], found[3])
        else:
            self.answer(404, {"error": "no such endpoint"})

    do_GET = do_HEAD = do_POST = handle_any

    def may_write(self) -> bool:
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        return self.hub.writers is None or token in self.hub.writers

    def create(self, asked: dict) -> None:
        name = f"{asked.get('organization') or 'someone'}/{asked['name']}"
        address = {"url": f"{self.hub.endpoint}/{name}"}
        if not self.may_write():
            self.answer(403, {"error": "no right to write"})
        elif name in self.hub.repositories:
            self.answer(409, {"error": "exists"} | address)
        else:
            private = {"private": True, "public": False}.get(asked.get("visibility", ""))
            self.hub.repositories[name] = Repository(private=private)
            self.hub.repositories[name].commit({".gitattributes": b"*.bin filter=lfs\n"})
            self.answer(200, address)

    def found(self, name: str, revision: str) -> str | None:
        """The commit, or None after an error was sent."""
        repository = self.hub.repositories.get(name)
        if repository is None:
            self.fail(404, "RepoNotFound")
            return None
        if repository.gated:
            self.fail(403, "GatedRepo")
            return None
        commit = repository.resolve(revision)
        if commit is None:
            self.fail(404, "RevisionNotFound")
        return commit

    def preupload(self, name: str, revision: str, asked: dict) -> None:
        if self.found(name, revision):
            files = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                for file in asked["files"]
            ]
            self.answer(200, {"files": files})

    def commit(self, name: str, revision: str, body: bytes) -> None:
        if not self.found(name, revision):
            return
        files = {}
        for line in body.splitlines():
            item = json.loads(line)
            if item["key"] == "file":
                files[item["value"]["path"]] = base64.b64decode(item["value"]["content"])
        request = "create_pr=1" in self.path
        branch = "refs/pr/1" if request else revision
        commit = self.hub.repositories[name].commit(files, branch)
        facts = {"commitUrl": f"{self.hub.endpoint}/{name}/commit/{commit}", "commitOid": commit}
        if request:
            facts["pullRequestUrl"] = f"{self.hub.endpoint}/{name}/discussions/1"
        self.answer(200, facts)

    def info(self, name: str, revision: str) -> None:
        commit = self.found(name, revision)
        if commit is None:
            return
        files = self.hub.repositories[name].commits[commit]
        siblings = [
            {"rfilename": file, "size": self.hub.sizes.get(file, len(data))}
            for file, data in files.items()
        ]
        self.answer(200, {"id": name, "sha": commit, "siblings": siblings})
        if self.hub.moves:
            repository, newer = self.hub.moves.pop()
            self.hub.repositories[repository].commit(newer)

    def file(self, name: str, revision: str, file: str) -> None:
        commit = self.found(name, revision)
        if commit is None:
            return
        data = self.hub.repositories[name].commits[commit].get(file)
        if data is None:
            self.fail(404, "EntryNotFound")
            return
        etag = f'"{hashlib.sha256(data).hexdigest()}"'
        self.answer(200, data, {"ETag": etag, "X-Repo-Commit": commit})


@contextmanager
def hub() -> Iterator[Hub]:
    """A running stand-in on a free port of this machine."""
    state = Hub()
    handler = type("Handler", (_Handler,), {"hub": state})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    state.endpoint = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
