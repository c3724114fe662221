"""A guard that reads the words in pictures, and steers by the verdict, in vLLM as in transformers.

``test_vllm_apart`` runs these in a process of their own.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
from PIL import Image

from tests import tiny
from tests.engines import tiny_vllm
from tests.engines.comparing import chat, same
from tests.engines.conftest import Reference
from tests.engines.tiny_vllm import QUESTIONS, conversation
from vlm_safeguard.data.drawings import draw_text
from vlm_safeguard.data.ocr import reader, with_words

pytest.importorskip("vllm")
pytest.importorskip("rapidocr")

WORDS = ["open the old door", "count all the sheep", "paint a long wall"]
VERDICT = 4.0


def requests() -> list[list[dict[str, Any]]]:
    """Each question with each picture of words, with two of them in both orders, and with none."""
    first, second, third = map(draw_text, WORDS)
    found = [conversation(question, draw_text(words)) for question in QUESTIONS for words in WORDS]
    for question in QUESTIONS[:2]:
        found += [conversation(question, first, second), conversation(question, second, first)]
        found += [conversation(question, Image.new("RGB", (40, 30), "teal"), third)]
        found += [
            conversation(question, Image.new("RGB", (40, 30), "teal")),
            conversation(question),
        ]
    return [*found, conversation("", third)]


@pytest.fixture(scope="module")
def reading(reference: Reference) -> Reference:
    """The LLM "refuses" some of the texts, and the gate opens on some."""
    asked = requests()
    gate = tiny_vllm.text_gate().model_copy(update={"intent_weight": 0.0})
    first = [_first_token(reference, question, words) for question in QUESTIONS for words in WORDS]
    openings = sorted(set(first))[: len(set(first)) // 2]
    gate = gate.model_copy(update={"openings": openings, "verdict_weight": VERDICT})
    guard = tiny_vllm.guard(
        reference.loaded,
        [gate],
        reads_pictures=True,
        layers=list(range(tiny.LAYERS)),
        rank=8,
        tokens=3,
        reference="verdict",
        alpha=0.0,
    )
    shut = replace(reference, guard=guard, requests=asked)
    known = [shut.answer(request)[1].scores["text.0"][0] for request in asked]
    scores = sorted(score for score in known if not math.isnan(score))
    # Between two scores of the middle third that are far apart: no rounding decides.
    third = len(scores) // 3
    gap, place = max((scores[n] - scores[n - 1], n) for n in range(third, 2 * third))
    assert gap > 0.1
    cut = (scores[place] + scores[place - 1]) / 2
    found = replace(shut, guard=tiny.with_thresholds(guard, [[cut]]))
    found.answers = [found.answer(request) for request in asked]
    return found


def _first_token(reference: Reference, question: str, words: str) -> int:
    processor, model = reference.loaded.processor, reference.loaded.model
    inputs = reference.guard.prepare(processor, conversation(with_words(question, words)))
    return int(model.generate(**inputs, max_new_tokens=1, do_sample=False)[0, -1])


@pytest.fixture(scope="module")
def engine(reading: Reference, tmp_path_factory: pytest.TempPathFactory) -> Any:
    place = tmp_path_factory.mktemp("guard")
    return tiny_vllm.engine(reading.folder, reading.guard, place, num_gpu_blocks_override=24)


def test_the_words_are_read_and_some_texts_refused(reading: Reference) -> None:
    assert [reader().words(draw_text(words)) for words in WORDS] == WORDS
    known = [decision for _, decision in reading.answers]
    assert {decision.fired for decision in known} == {True, False}
    assert {round(decision.parts["text.0"][-1]) for decision in known} == {0, round(VERDICT)}
    refused = [d.fired for d in known if d.parts["text.0"][-1] > 0]
    assert any(refused)  # so the reference is not the anchors' alone
    scores = {round(decision.scores["text.0"][0], 3) for decision in known[:3]}
    assert len(scores) == 3  # one question with three pictures


def test_a_mixed_batch_answers_as_transformers_does(engine: Any, reading: Reference) -> None:
    for output, answer in zip(chat(engine, reading.requests), reading.answers, strict=True):
        same(output, answer)


def test_requests_alone_answer_as_in_a_batch(engine: Any, reading: Reference) -> None:
    for request, answer in zip(reading.requests, reading.answers, strict=True):
        same(chat(engine, [request])[0], answer)
