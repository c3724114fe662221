"""The command `serve`, as an operator runs it: keys, log, audit, the end."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import httpx
import pytest

from tests.command import run
from tests.server.live import open_guard
from vlm_safeguard.model.loading import load
from vlm_safeguard.server.audit import entries

KEYS = {"VLM_SAFEGUARD_API_KEYS": "asks,other", "VLM_SAFEGUARD_TRUSTED_KEYS": "sees"}


@pytest.fixture(scope="module")
def guard(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    saved = tmp_path_factory.mktemp("guard")
    open_guard(load(folder).model).save_pretrained(saved)
    return saved


def test_a_server_from_its_start_to_sigterm(folder: Path, guard: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "vlm_safeguard", "serve", str(folder), "--guard", str(guard)]
    command += ["--port", "0", "--served-name", "mine", "--audit", "audit.jsonl"]
    command += ["--max-tokens", "8", "--max-prompt-tokens", "500"]
    server = subprocess.Popen(
        command, cwd=tmp_path, env=os.environ | KEYS, stderr=subprocess.PIPE, text=True
    )
    deadline = threading.Timer(120, server.kill)
    deadline.start()
    try:
        assert server.stderr is not None
        told, url = [], None
        while url is None:
            line = server.stderr.readline()
            assert line, told
            told.append(line)
            url = re.search(r"ready: (http://127\.0\.0\.1:\d+/v1) \(mine, mode enforce\)", line)
        body = {"model": "mine", "messages": [{"role": "user", "content": "a secret"}]}
        ask = f"{url[1]}/chat/completions"
        assert httpx.post(ask, json=body, timeout=60).status_code == 401
        for key, sees in (("asks", False), ("sees", True)):
            headers = {"Authorization": f"Bearer {key}"}
            answer = httpx.post(ask, json=body, headers=headers, timeout=60)
            assert answer.status_code == 200
            assert answer.json()["safeguard"]["status"] == "guarded"
            assert ("fired" in answer.json()["safeguard"]) == sees
        server.send_signal(signal.SIGTERM)
        rest = server.stderr.read()
        assert server.wait() == 128 + signal.SIGTERM
    finally:
        deadline.cancel()
        server.kill()
        server.wait()
    log = [json.loads(line) for line in [*told, *rest.splitlines()] if line.startswith("{")]
    asked = [line for line in log if line["message"] == "request"]
    assert [line["status"] for line in asked] == [401, 200, 200]
    assert all(line["path"] == "/v1/chat/completions" and line["id"] for line in asked)
    assert "secret" not in "".join(told) + rest
    assert [one["outcome"] for one in entries(tmp_path / "audit.jsonl")] == ["answered"] * 2


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (("--host", "0.0.0.0"), "0.0.0.0 is not loopback: set VLM_SAFEGUARD_API_KEYS"),
        (("--audit-content",), "--audit-content needs --audit FILE"),
        (("--guard", "nowhere"), "nowhere"),
    ],
)
def test_what_cannot_be_served_is_refused_at_once(
    folder: Path, guard: Path, tmp_path: Path, options: tuple[str, ...], reason: str
) -> None:
    given = ("--guard", str(guard)) if "--guard" not in options else ()
    found = run("serve", folder, *given, "--port", "0", *options, cwd=tmp_path)
    assert found.returncode != 0 and reason in found.stderr
    assert "Traceback" not in found.stderr


def test_a_port_that_is_taken_shows_at_once(folder: Path, guard: Path, tmp_path: Path) -> None:
    from vlm_safeguard.utils.network import listen

    with listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        found = run("serve", folder, "--guard", guard, "--port", port, cwd=tmp_path)
    assert found.returncode != 0 and str(port) in found.stderr and "loading" not in found.stderr
