"""`vlm-safeguard serve --engine vllm`: modes, headers, audit log, another guard."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from tests import tiny
from tests.engines.conftest import NEW, Reference
from tests.engines.test_vllm_thread import contents
from vlm_safeguard.guard import Guard
from vlm_safeguard.utils.network import listen

pytest.importorskip("vllm")
START = 600  # seconds


@contextmanager
def serving(reference: Reference, guard: Guard, folder: Path, *more: str) -> Iterator[httpx.Client]:
    guard.save_pretrained(folder / "guard")
    with listen("127.0.0.1", 0) as listener:
        port = listener.getsockname()[1]
    code = "from vlm_safeguard.cli import main; main()"
    command = [sys.executable, "-c", code, "serve", str(reference.folder), "--engine", "vllm"]
    command += ["--guard", str(folder / "guard"), "--port", str(port), "--served-name", "tiny"]
    command += ["--max-prompt-tokens", "400", "--max-tokens", "100", *more]
    own = {name: value for name, value in os.environ.items() if name != "VLM_SAFEGUARD"}
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, env=own, stdout=log, stderr=log, cwd=folder)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=120) as client:
            end = time.monotonic() + START
            while not _is_ready(client):
                if process.poll() is not None or time.monotonic() > end:
                    pytest.fail((folder / "log").read_text()[-4000:])
                time.sleep(1)
            yield client
    finally:
        process.terminate()
        process.wait(60)


def _is_ready(client: httpx.Client) -> bool:
    try:
        return client.get("/ready").status_code == 200
    except httpx.TransportError:
        return False


def ask(client: httpx.Client, content: Any, **more: Any) -> httpx.Response:
    body = {"model": "tiny", "messages": [{"role": "user", "content": content}], "max_tokens": NEW}
    return client.post("/v1/chat/completions", json=body | more)


def openings(client: httpx.Client) -> int:
    name = r"^vlm_safeguard_gate_openings_total\S* ([0-9.]+)"
    found = re.findall(name, client.get("/metrics").text, re.MULTILINE)
    return int(sum(map(float, found)))


def test_the_chat_route_is_guarded(reference: Reference, tmp_path: Path) -> None:
    with serving(reference, reference.guard, tmp_path, "--audit", "audit.jsonl") as client:
        replies = [ask(client, content) for content in contents(reference)]
        assert openings(client) == sum(len(d.sources) for _, d in reference.answers)
        streamed = ask(client, contents(reference)[0], stream=True).text
    decode = reference.loaded.processor.tokenizer.decode
    for reply, (tokens, decision) in zip(replies, reference.answers, strict=True):
        body = reply.json()
        assert body["choices"][0]["message"]["content"] == decode(tokens, skip_special_tokens=True)
        assert body["safeguard"]["gates"] == list(decision.sources)
        assert reply.headers["x-safeguard-status"] == "guarded"
        assert reply.headers["x-safeguard-mode"] == "enforce"
    frames = [json.loads(line[6:]) for line in streamed.splitlines() if line.startswith("data: {")]
    said = "".join(one["choices"][0]["delta"].get("content", "") for one in frames)
    assert said == replies[0].json()["choices"][0]["message"]["content"]
    entries = [json.loads(line) for line in (tmp_path / "audit.jsonl").read_text().splitlines()]
    assert [one["fired"] for one in entries[:-1]] == [d.fired for _, d in reference.answers]
    assert {one["outcome"] for one in entries} == {"answered"}


def test_another_guard_on_the_same_server_decides_otherwise(
    reference: Reference, tmp_path: Path
) -> None:
    """Every gate of this one opens: a guard that was silently off would open none."""
    opens = tiny.with_thresholds(reference.guard, [[-1e9], [-1e9]])
    with serving(reference, opens, tmp_path, "--mode", "refuse", "--refusal", "No.") as client:
        replies = [ask(client, content) for content in contents(reference)[:6]]
        assert openings(client) == 12
    for reply in replies:
        assert reply.json()["choices"][0]["message"]["content"] == "No."
        assert reply.json()["choices"][0]["finish_reason"] == "content_filter"


@pytest.mark.skipif(torch.cuda.device_count() == 1, reason="each rank needs a GPU")
def test_two_ranks_answer_as_one(reference: Reference, tmp_path: Path) -> None:
    with serving(reference, reference.guard, tmp_path, "--tensor-parallel", "2") as client:
        replies = [ask(client, content) for content in contents(reference)[:6]]
    for reply, (tokens, decision) in zip(replies, reference.answers, strict=False):
        own = reference.loaded.processor.tokenizer.decode(tokens, skip_special_tokens=True)
        assert reply.json()["choices"][0]["message"]["content"] == own
        assert reply.json()["safeguard"]["gates"] == list(decision.sources)


def test_monitor_answers_as_the_model_does(reference: Reference, tmp_path: Path) -> None:
    with serving(reference, reference.guard, tmp_path, "--mode", "monitor") as client:
        replies = [ask(client, content) for content in contents(reference)[:6]]
    model, processor = reference.loaded.model, reference.loaded.processor
    for reply, conversation, (_, decision) in zip(
        replies, reference.requests, reference.answers, strict=False
    ):
        inputs = reference.guard.prepare(processor, conversation)
        out = model.generate(**inputs, max_new_tokens=NEW, do_sample=False)
        own = processor.tokenizer.decode(
            out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True
        )
        body = reply.json()
        assert body["choices"][0]["message"]["content"] == own
        assert body["safeguard"]["gates"] == list(decision.sources)
        assert body["safeguard"]["status"] == "monitor"
