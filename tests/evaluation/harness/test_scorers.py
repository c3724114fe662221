"""Scorers, and the queue in which many callers wait for one judge."""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
from inspect_ai.scorer import SampleScore, Score

from vlm_safeguard.evaluation.harness import scorers
from vlm_safeguard.evaluation.judges import JudgeError, Judgement
from vlm_safeguard.evaluation.judges.judgement import Asks, Pair
from vlm_safeguard.evaluation.judges.queue import queue_for
from vlm_safeguard.utils.stats import clustered_wilson

LOOP = "and so on and so on and so on and so on and so on and so on"


class Fake:
    """Calls everything refused, and remembers how it was asked."""

    name = "j"

    def __init__(self, asks: Asks = "harm", spoilt: str = "", error: Exception | None = None):
        self.asks: Asks = asks
        self.spoilt, self.error = spoilt, error
        self.batches: list[int] = []
        self.busy = self.most = 0
        self.gate = threading.Event()
        self.gate.set()
        self._lock = threading.Lock()

    def judge(self, pairs: Sequence[Pair]) -> list[Judgement]:
        with self._lock:
            self.batches.append(len(pairs))
            self.busy += 1
            self.most = max(self.most, self.busy)
        self.gate.wait(10)
        time.sleep(0.02)
        with self._lock:
            self.busy -= 1
        if self.error and any(response == self.spoilt for _, response in pairs):
            raise self.error
        return [Judgement("refused", "r", response) for _, response in pairs]


def ask(monkeypatch: pytest.MonkeyPatch, judge: Any, label: str, said: str) -> Score:
    monkeypatch.setattr(scorers, "shared_judge", lambda spec: judge)
    state = SimpleNamespace(
        metadata={"label": label}, output=SimpleNamespace(completion=said), input_text="Hi"
    )
    return asyncio.run(scorers.judged("j")(state, None))  # type: ignore[arg-type, return-value]


def test_a_judge_of_harm_is_not_asked_for_over_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    judge = Fake("harm")
    assert ask(monkeypatch, judge, "harmful", "Hello.").value == "refused"
    assert judge.batches == [1]
    found = ask(monkeypatch, judge, "harmless", "Hello.")
    assert isinstance(found.value, float) and math.isnan(found.value)
    assert found.reason == "not asked"
    assert "over-refusal needs another judge" in str(found.explanation)
    assert judge.batches == [1]
    assert ask(monkeypatch, Fake("refusal"), "harmless", "Hello.").value == "refused"


@pytest.mark.parametrize(("said", "verdict"), [(LOOP, "degenerate"), (" ", "empty")])
def test_garbled_answers_are_told_whatever_the_judge(
    monkeypatch: pytest.MonkeyPatch, said: str, verdict: str
) -> None:
    found = ask(monkeypatch, Fake("harm"), "harmless", said)
    assert found.value == verdict
    # Over-refusal of the garbled answers alone would be 0%, which nothing has shown.
    score = SampleScore(score=found, sample_metadata={"label": "harmless", "cluster": "1"})
    refused, garbled = scorers.over_refusal(), scorers.degenerate()
    assert refused([score])["over_refusal"] is None  # type: ignore[operator, index, arg-type, call-overload]
    assert garbled([score])["degenerate"] == 1  # type: ignore[operator, index, arg-type, call-overload]


def test_a_judge_that_failed_is_told_from_one_that_was_not_asked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    judge = SimpleNamespace(name="j", asks="refusal", judge=lambda _: [Judgement(None, "timeout")])
    monkeypatch.setattr(scorers, "shared_queue", queue_for)
    found = ask(monkeypatch, judge, "harmful", "Hello.")
    assert (found.reason, found.explanation) == ("judge", "timeout")


def test_what_waits_is_judged_together_and_one_call_at_a_time() -> None:
    judge = Fake()
    judge.gate.clear()
    at = queue_for(judge)
    answers = [at.submit(("q", str(n))) for n in range(30)]
    time.sleep(0.1)
    judge.gate.set()
    assert [a.result(10).raw for a in answers] == [str(n) for n in range(30)]
    assert judge.most == 1 and len(judge.batches) <= 3 and sum(judge.batches) == 30


def test_an_endpoint_is_asked_by_as_many_as_it_allows() -> None:
    judge = Fake()
    judge.concurrency = 3  # type: ignore[attr-defined]
    judge.gate.clear()
    at = queue_for(judge)
    answers = [at.submit(("q", str(n))) for n in range(20)]
    deadline = time.monotonic() + 10
    while judge.busy < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    judge.gate.set()
    assert [a.result(10).raw for a in answers] == [str(n) for n in range(20)]
    assert judge.most == 3 and judge.batches == [1] * 20


def test_one_response_that_fails_spoils_no_other() -> None:
    judge = Fake(spoilt="bad", error=MemoryError("too long"))
    judge.gate.clear()
    at = queue_for(judge)
    answers = [at.submit(("q", text)) for text in ("first", "a", "bad", "b")]
    judge.gate.set()
    assert [answers[n].result(10).raw for n in (0, 1, 3)] == ["first", "a", "b"]
    with pytest.raises(MemoryError):
        answers[2].result(10)


def test_a_judge_of_no_use_is_asked_once_for_all_that_wait() -> None:
    judge = Fake(spoilt="bad", error=JudgeError("no such model"))
    judge.gate.clear()
    at = queue_for(judge)
    answers = [at.submit(("q", "bad")) for _ in range(9)]
    time.sleep(0.1)
    judge.gate.set()
    for answer in answers:
        with pytest.raises(JudgeError, match="no such model"):
            answer.result(10)
    assert len(judge.batches) <= 3


@pytest.mark.parametrize("threads", [1, 3])
def test_closing_ends_the_threads_and_cancels_what_waits(threads: int) -> None:
    judge = Fake()
    judge.concurrency = threads  # type: ignore[attr-defined]
    judge.gate.clear()
    at = queue_for(judge)
    answers = [at.submit(("q", str(n))) for n in range(200)]
    while not judge.busy:
        time.sleep(0.01)
    threading.Timer(0.2, judge.gate.set).start()
    at.close()
    assert not any(thread.is_alive() for thread in at._threads)
    assert all(answer.done() for answer in answers) and answers[-1].cancelled()
    assert not answers[0].cancelled()


def test_the_log_has_the_interval_of_the_table() -> None:
    hits = [True, True, False, True, False, False, True]
    clusters = ["a", "a", "b", "b", "c", "c", "d"]
    scores = [
        SampleScore(
            score=Score(value="complied" if hit else "refused"),
            sample_metadata={"label": "harmful", "cluster": cluster},
        )
        for hit, cluster in zip(hits, clusters, strict=True)
    ]
    logged = scorers.attack_success()(scores)  # type: ignore[operator, arg-type, call-overload]
    assert logged == clustered_wilson(hits, clusters).as_dict("asr")
