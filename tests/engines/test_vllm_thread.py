"""The inference thread over vLLM answers as transformers under guard does, in every mode."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.engines import tiny_vllm
from tests.engines.conftest import NEW, Reference
from tests.server.live import wait_until
from vlm_safeguard.errors import SafeguardError, UnreadableText
from vlm_safeguard.model.text_reader import TextReader
from vlm_safeguard.server import http_errors
from vlm_safeguard.server.batch import answer_all
from vlm_safeguard.server.batch_file import URL, read_tasks
from vlm_safeguard.server.inference_thread import InferenceThread
from vlm_safeguard.server.settings import Settings
from vlm_safeguard.server.telemetry import Telemetry

pytest.importorskip("vllm")
vllm_engine = pytest.importorskip("vlm_safeguard.server.vllm_engine")


@contextmanager
def running(engine: Any, **chosen: Any) -> Iterator[Any]:
    """The thread over the tests' vLLM, which goes on without it."""
    known: dict[str, Any] = {"model": "tiny", "max_prompt_tokens": 400, "max_tokens": 60}
    made = vllm_engine.VllmEngine(engine, False, Settings(**known | chosen), Telemetry())
    made.start()
    try:
        yield made
    finally:
        InferenceThread.close(made)
        assert not engine.llm_engine.has_unfinished_requests()


def asked(
    made: Any, folder: Path, contents: list[Any], **body: Any
) -> tuple[list[dict[str, Any]], Any]:
    """Answers to requests, in their order; and the counters of the thread."""
    rows = [
        {
            "custom_id": str(number),
            "method": "POST",
            "url": URL,
            "body": {
                "model": "tiny",
                "messages": [{"role": "user", "content": content}],
                "max_tokens": NEW,
            }
            | body,
        }
        for number, content in enumerate(contents)
    ]
    path = folder / "in.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found: list[dict[str, Any]] = []
    answer_all(made, read_tasks(path, "guard"), found.append)
    return sorted(found, key=lambda one: int(one["custom_id"])), made.telemetry


def contents(reference: Reference) -> list[Any]:
    return [[tiny_vllm.openai(part) for part in turn[0]["content"]] for turn in reference.requests]


def text_of(answer: dict[str, Any]) -> str:
    return str(answer["response"]["body"]["choices"][0]["message"]["content"])


def gates_of(answer: dict[str, Any]) -> tuple[str, ...]:
    return tuple(answer["response"]["body"]["safeguard"]["gates"])


def opened(telemetry: Any) -> int:
    return int(sum(telemetry.gates.labels(gate)._value.get() for gate in ("text", "vlm")))


def test_enforce_answers_as_transformers_does(
    engine: Any, reference: Reference, tmp_path: Path
) -> None:
    with running(engine) as made:
        before = opened(made.telemetry)
        answers, telemetry = asked(made, tmp_path, contents(reference))
    decode = reference.loaded.processor.tokenizer.decode
    for answer, (tokens, decision) in zip(answers, reference.answers, strict=True):
        assert gates_of(answer) == decision.sources
        assert text_of(answer) == decode(tokens, skip_special_tokens=True)
        body = answer["response"]["body"]
        assert body["safeguard"]["status"] == "guarded"
        assert body["usage"]["completion_tokens"] == len(tokens)
        pictures = body["safeguard"]["pictures"]
        assert pictures["sent"] == pictures["reached_model"]
    total = sum(len(decision.sources) for _, decision in reference.answers)
    assert opened(telemetry) - before == total


def test_refuse_answers_with_the_refusal_where_a_gate_opens(
    engine: Any, reference: Reference, tmp_path: Path
) -> None:
    with running(engine, mode="refuse", refusal="No, thanks.") as made:
        answers, _ = asked(made, tmp_path, contents(reference))
    for answer, (_, decision) in zip(answers, reference.answers, strict=True):
        choice = answer["response"]["body"]["choices"][0]
        assert (choice["finish_reason"] == "content_filter") is decision.fired
        assert (text_of(answer) == "No, thanks.") is decision.fired


def test_stop_sequences_end_an_answer_and_its_request(
    engine: Any, reference: Reference, tmp_path: Path
) -> None:
    tokens, _ = reference.answers[0]
    text = reference.loaded.processor.tokenizer.decode(tokens, skip_special_tokens=True)
    stop = next(letter for letter in text[2:] if letter.isascii() and letter != " ")
    with running(engine) as made:
        [answer], _ = asked(made, tmp_path, contents(reference)[:1], stop=stop)
    assert text_of(answer) == text[: text.index(stop)]
    assert answer["response"]["body"]["choices"][0]["finish_reason"] == "stop"


def test_what_cannot_be_answered_gets_its_reason(
    engine: Any, reference: Reference, monkeypatch: Any, tmp_path: Path
) -> None:
    read = TextReader.other_form

    def other_form(reader: TextReader, ids: list[int]) -> list[int] | None:
        if "hidden" in reader._decoded(ids):
            raise UnreadableText("secret")
        return read(reader, ids)

    monkeypatch.setattr(TextReader, "other_form", other_form)
    with running(engine) as made:
        answers, _ = asked(made, tmp_path, ["word " * 100, "a hidden token", "Hello"])
    long, hidden, plain = answers
    assert long["response"]["status_code"] == 400
    assert "at most 400" in long["response"]["body"]["error"]["message"]
    assert hidden["response"]["status_code"] == 400
    assert "control token" in hidden["response"]["body"]["error"]["message"]
    assert plain["response"]["status_code"] == 200


def test_a_prompt_that_is_too_long_with_its_pictures_is_told_its_length(
    engine: Any, reference: Reference, tmp_path: Path
) -> None:
    """vLLM would refuse it as well, and the reason would not be told."""
    most = engine.llm_engine.model_config.max_model_len - 2
    *pictures, _ = contents(reference)[7]
    frame = 21  # tokens of the chat template and of two pictures before they are expanded
    fits = "x" * (most - frame)  # a token each
    with running(engine, max_prompt_tokens=most, max_tokens=1) as made:
        rows = [[*pictures, {"type": "text", "text": fits}], fits]
        (long, plain), _ = asked(made, tmp_path, rows, max_tokens=1)
    assert long["response"]["status_code"] == 400
    told = long["response"]["body"]["error"]["message"]
    assert told == str(http_errors.too_long(most + 2 * 3, most))  # four tokens each
    assert plain["response"]["status_code"] == 200


def test_a_text_that_is_too_long_to_read_is_told_its_length(
    engine: Any, monkeypatch: Any, tmp_path: Path
) -> None:
    """Words in pictures and the canonical form may make it longer than the prompt."""
    most = engine.llm_engine.model_config.max_model_len - 1
    with running(engine) as made:
        monkeypatch.setattr(TextReader, "other_form", lambda _, ids: ids[:1] * (most + 1))
        [answer], _ = asked(made, tmp_path, ["Hello"])
        monkeypatch.undo()
        [plain], _ = asked(made, tmp_path, ["Hello"])
    assert answer["response"]["status_code"] == 400
    told = answer["response"]["body"]["error"]["message"]
    assert f"has {most + 1} tokens; at most {most} are accepted" in told
    assert plain["response"]["status_code"] == 200


def test_a_blocked_request_is_an_error_and_nothing_is_ready(
    engine: Any, reference: Reference, runner: Any, monkeypatch: Any, tmp_path: Path
) -> None:
    with running(engine, check_every=0.3) as made:
        monkeypatch.setattr(runner._texts, "keep", lambda text: None)
        answers, telemetry = asked(made, tmp_path, contents(reference)[:1])
        assert answers[0]["error"]["code"] == "guard_failed"
        assert telemetry.failures._value.get() >= 1
        assert wait_until(lambda: not made.ready.is_set())  # the self-check finds it too
        monkeypatch.undo()
        assert wait_until(made.ready.is_set)
        answers, _ = asked(made, tmp_path, contents(reference)[:1])
        assert gates_of(answers[0]) == reference.answers[0][1].sources


def test_a_failed_self_check_ends_what_runs(engine: Any, tmp_path: Path, monkeypatch: Any) -> None:
    """The check fails as soon as a request runs."""
    monkeypatch.setattr(vllm_engine.VllmEngine, "_opens", lambda made: not made._running)
    with running(engine, check_every=0.01) as made:
        with pytest.raises(SafeguardError, match="The same command goes on"):
            asked(made, tmp_path, ["Hello"], max_tokens=40)
        assert made.telemetry.self_check_failures._value.get() > 0
