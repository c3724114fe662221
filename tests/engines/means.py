"""A guard with a gate that reads the mean over a text's words and a probe behind it, in vLLM as in
transformers.

``test_vllm_apart`` runs these in a process of their own.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from tests.engines import tiny_vllm
from tests.engines.comparing import chat, same
from tests.engines.conftest import Reference
from tests.engines.probed import probed
from vlm_safeguard.engines.vllm.texts import TextForms
from vlm_safeguard.errors import GuardRuntimeError

pytest.importorskip("vllm")


@pytest.fixture(scope="module")
def means(reference: Reference) -> Reference:
    return probed(reference)


@pytest.fixture(scope="module")
def engine(means: Reference, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """vLLM with little room: prompts come in chunks, and requests are preempted."""
    place = tmp_path_factory.mktemp("guard")
    return tiny_vllm.engine(means.folder, means.guard, place, num_gpu_blocks_override=24)


def test_the_gate_opens_on_some_requests_and_not_on_others(means: Reference) -> None:
    opened = {answer.scores["text.2"][0] > 0 for _, answer in means.answers}
    assert opened == {True, False}


def test_mixed_batches_answer_as_transformers_does(
    engine: Any, means: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twice as many requests as there are: the second time texts would be in the prefix cache."""
    scheduler = type(engine.llm_engine.engine_core.engine_core.scheduler)
    own, preempted = scheduler._preempt_request, []

    def preempt(self: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        preempted.append(request.request_id)
        return own(self, request, *args, **kwargs)

    monkeypatch.setattr(scheduler, "_preempt_request", preempt)
    outputs = chat(engine, means.requests * 2)
    for output, answer in zip(outputs, means.answers * 2, strict=True):
        same(output, answer)
    assert preempted


def test_requests_alone_answer_as_in_a_batch(engine: Any, means: Reference) -> None:
    for request, answer in zip(means.requests, means.answers, strict=True):
        same(chat(engine, [request])[0], answer)


def test_words_from_the_prefix_cache_block_their_request(
    engine: Any, means: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vlm_safeguard.engines.vllm.front_end import decisions

    own = TextForms.order
    monkeypatch.setattr(
        TextForms, "order", lambda *args, **kwargs: replace(own(*args, **kwargs), uncached=False)
    )
    longer = tiny_vllm.conversation("A sentence that nobody said before and that fills two blocks")
    first, second = (chat(engine, [longer])[0] for _ in range(2))
    same(first, means.answer(longer))
    with pytest.raises(GuardRuntimeError, match="words of its text were not computed under guard"):
        decisions(second)
