"""The provider and its engine: many callers, each answered as if alone."""

from __future__ import annotations

import asyncio
from pathlib import Path
from threading import Event, Thread
from typing import Any

import pytest
from inspect_ai.model import (
    ChatMessageSystem,
    ChatMessageUser,
    ContentImage,
    ContentText,
    GenerateConfig,
)

from vlm_safeguard.calibration.generation import Response, respond
from vlm_safeguard.data import prompts
from vlm_safeguard.data.inputs import Query, queries
from vlm_safeguard.errors import DataError, ImageError, SafeguardError
from vlm_safeguard.evaluation.harness import tasks
from vlm_safeguard.evaluation.harness.engine import Engine
from vlm_safeguard.evaluation.harness.provider import VlmSafeguardAPI, read_request
from vlm_safeguard.model.loading import load


def user(*parts: Any) -> list[Any]:
    return [ChatMessageUser(content=list(parts))]


def test_many_callers_get_what_each_would_get_alone(folder: Path) -> None:
    chosen = prompts.evaluation("malicious")[:5] + prompts.evaluation("picture")[:5]
    items = queries(chosen, "picture")
    provider = VlmSafeguardAPI(str(folder), batch=4)

    async def ask() -> list[Any]:
        config = GenerateConfig(max_tokens=6)
        calls = [provider.generate(tasks.messages(i), [], "none", config) for i in items]
        return await asyncio.gather(*calls)

    outputs = asyncio.run(ask())
    loaded = load(folder)
    for item, output in zip(items, outputs, strict=True):
        [alone] = respond(loaded, [item], max_new_tokens=6)
        assert output.completion == alone.text
        assert output.usage.output_tokens == alone.tokens
        assert output.stop_reason == ("max_tokens" if alone.truncated else "stop")


def test_a_request_that_fails_spoils_no_other(folder: Path) -> None:
    provider = VlmSafeguardAPI(str(folder), batch=4)
    good, bad = Query("Hello", None), Query("Hello", "no picture")  # type: ignore[arg-type]
    answers = [provider.engine.submit(item, None, 4) for item in (good, bad, good)]
    assert answers[0].result(60) == answers[2].result(60)
    with pytest.raises(Exception, match=r"(?i)image|picture"):
        answers[1].result(60)


def test_closing_ends_the_thread_and_cancels_what_waits(folder: Path) -> None:
    one = Engine(load(folder), 1)
    answers = [one.submit(Query("Hello", None), None, 4) for _ in range(40)]
    first = answers[0].result(60)
    one.close()
    assert not any(thread.is_alive() for thread in one._worker._threads)
    assert all(answer.done() for answer in answers)
    assert answers[-1].cancelled()
    assert all(answer.cancelled() or answer.result() == first for answer in answers)


def test_closing_does_not_wait_for_what_workers_of_ray_have_begun(folder: Path) -> None:
    class Pool:
        """Works until it is closed, as workers of Ray are ended in the midst of a part."""

        def __init__(self) -> None:
            self.size, self.begun, self.closed = 2, Event(), Event()

        def work(self, part: Any) -> Any:
            self.begun.set()
            assert self.closed.wait(60)
            raise SafeguardError("the workers ended")

        def close(self) -> None:
            self.closed.set()

    pool = Pool()
    one = Engine(load(folder), 2, pool)  # type: ignore[arg-type]
    answers = [one.submit(Query("Hello", None), None, 4) for _ in range(9)]
    assert pool.begun.wait(60)
    closing = Thread(target=one.close, daemon=True)
    closing.start()
    closing.join(30)
    assert not closing.is_alive()
    assert all(answer.done() for answer in answers)
    assert answers[-1].cancelled()


def test_what_nobody_waits_for_is_not_answered(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answered: list[str] = []

    def echo(loaded: Any, items: Any, *rest: Any, **options: Any) -> Any:
        answered.extend(item.text for item in items)
        return [Response(item.text, 1, False, None) for item in items]

    monkeypatch.setattr("vlm_safeguard.evaluation.harness.engine.respond", echo)
    one = Engine(load(folder), 1)
    given_up, wanted = (one.submit(Query(text, None), None, 4) for text in ("a", "b"))
    assert given_up.cancel()
    assert wanted.result(60).text == "b"
    one.close()
    assert answered == ["b"]


def test_requests_that_the_provider_cannot_answer_are_refused(folder: Path) -> None:
    picture = ContentImage(image="data:image/png;base64,AAAA")
    with pytest.raises(DataError, match="single user turns"):
        read_request([ChatMessageSystem(content="Be kind."), *user(ContentText(text="Hi"))])
    with pytest.raises(DataError, match="at most one picture"):
        read_request(user(picture, picture, ContentText(text="Hi")))
    with pytest.raises(ImageError, match="not a PNG"):
        read_request(user(picture, ContentText(text="Hi")))
    with pytest.raises(DataError, match="never downloaded"):
        read_request(user(ContentImage(image="https://example.org/a.png")))
    with pytest.raises(DataError, match="unknown model argument defense"):
        VlmSafeguardAPI(str(folder), defense="guard")
    with pytest.raises(DataError, match="needs a guard"):
        VlmSafeguardAPI(str(folder), defence="guard")
