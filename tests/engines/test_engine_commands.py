"""The commands `batch` and `evaluate` say with vLLM and over Ray what they say in transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests import tiny
from tests.command import run_apart
from tests.engines import tiny_vllm

ENGINES = {"ray": ["--engine", "ray", "--workers", "2"], "vllm": ["--engine", "vllm"]}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, a guard whose gates open on some requests, and a batch."""
    place = tmp_path_factory.mktemp("commands")
    folder = tiny_vllm.save(place / "model")
    gates = [tiny_vllm.text_gate(), tiny.gate("vlm", 4)]
    guard = tiny_vllm.guard(tiny_vllm.loaded(folder), gates, layers=[2, 4])
    guard.save_pretrained(place / "guard")
    rows = []
    for number, question in enumerate(tiny_vllm.QUESTIONS):
        messages = [{"role": "user", "content": question}]
        body = {"model": "model", "messages": messages, "max_tokens": 6}
        url = "/v1/chat/completions"
        rows.append({"custom_id": str(number), "method": "POST", "url": url, "body": body})
    (place / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return place


def run(place: Path, *arguments: str) -> dict[str, Any]:
    """What a command prints with --json."""
    done = run_apart(*arguments, "--guard", "guard", "--json", "--quiet", cwd=place)
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def answers(place: Path, name: str, *options: str) -> dict[str, str]:
    command = ["batch", "in.jsonl", "model", "-o", f"{name}.jsonl", *options]
    command += ["--max-prompt-tokens", "200", "--max-tokens", "32"]
    assert run(place, *command)["errors"] == 0
    rows = map(json.loads, (place / f"{name}.jsonl").read_text().splitlines())
    return {
        row["custom_id"]: row["response"]["body"]["choices"][0]["message"]["content"]
        for row in rows
    }


def responses(place: Path, name: str, *options: str) -> str:
    command = ["evaluate", "model", "--defence", "none", "--defence", "guard", "--limit", "3"]
    command += ["--benchmark", "own_malicious", "--setting", "blank", "--max-new-tokens", "6"]
    run(place, *command, "-o", name, *options)
    return (place / name / "responses.jsonl").read_text()


@pytest.mark.parametrize("engine", ENGINES)
def test_a_batch_is_answered_alike(place: Path, engine: str) -> None:
    pytest.importorskip(engine)
    found = answers(place, f"batch-{engine}", *ENGINES[engine])
    assert found == answers(place, f"batch-{engine}-plain")
    assert len(found) == len(tiny_vllm.QUESTIONS)


@pytest.mark.parametrize("engine", ENGINES)
def test_an_evaluation_finds_the_same(place: Path, engine: str) -> None:
    pytest.importorskip(engine)
    pytest.importorskip("inspect_ai")
    found = responses(place, f"evaluate-{engine}", *ENGINES[engine])
    assert found == responses(place, f"evaluate-{engine}-plain")
    assert len(found.splitlines()) == 12
