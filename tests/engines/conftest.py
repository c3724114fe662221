"""One tiny model, guard and engine for all tests of vLLM; they are skipped where it is missing."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from tests import tiny
from tests.engines import tiny_vllm
from vlm_safeguard.guard import Guard
from vlm_safeguard.model.loading import LoadedModel
from vlm_safeguard.runtime.attestation import Decision

NEW = 12  # tokens of an answer


@dataclass
class Reference:
    """The transformers path: the model, the guard, and what it answers to each request."""

    folder: Path
    loaded: LoadedModel
    guard: Guard
    requests: list[list[dict[str, Any]]]
    answers: list[tuple[list[int], Decision]]

    def answer(self, conversation: list[dict[str, Any]]) -> tuple[list[int], Decision]:
        """Greedy tokens and decision."""
        return _answers(self.loaded, self.guard, [conversation])[0]

    def of_ids(self, ids: list[int]) -> tuple[list[int], Decision]:
        """The same of a prompt in token ids."""
        model = self.loaded.model
        with self.guard.attach(model, self.loaded.processor) as session:
            prompt = torch.tensor([ids])
            out = model.generate(input_ids=prompt, max_new_tokens=NEW, do_sample=False)
            return out[0, len(ids) :].tolist(), session.decisions[0]


def _answers(
    loaded: LoadedModel, guard: Guard, requests: list[list[dict[str, Any]]]
) -> list[tuple[list[int], Decision]]:
    found = []
    with guard.attach(loaded.model, loaded.processor) as session:
        for conversation in requests:
            inputs = guard.prepare(loaded.processor, conversation)
            out = loaded.model.generate(**inputs, max_new_tokens=NEW, do_sample=False)
            tokens = out[0, inputs["input_ids"].shape[1] :].tolist()
            found.append((tokens, session.decisions[0]))
    return found


def _colour(number: int) -> Image.Image:
    return Image.new("RGB", (40 + number, 30), (20 * number, 90, 10))


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    """Gates open on half of the requests: as text, and in the VLM."""
    folder = tiny_vllm.save(tmp_path_factory.mktemp("model"))
    loaded = tiny_vllm.loaded(folder)
    questions = tiny_vllm.QUESTIONS
    requests = [tiny_vllm.conversation(question) for question in questions]
    for number, question in enumerate(questions):
        requests.append(tiny_vllm.conversation(question, _colour(number)))
        requests.append(tiny_vllm.conversation(question, _colour(9 - number), _colour(number)))
    requests.append(tiny_vllm.conversation("", _colour(3)))  # a picture without words
    requests.append(tiny_vllm.conversation("How do I b\u200bake \uff42read?", _colour(4)))
    requests.append(tiny_vllm.conversation("A longer question. " * 12, _colour(5)))
    guard = tiny_vllm.guard(
        loaded,
        [tiny_vllm.text_gate(), tiny.gate("vlm", 4)],
        layers=list(range(tiny.LAYERS)),
        rank=8,
        tokens=3,
        reference="text",
        alpha=0.0,
    )
    scores = [decision.scores for _, decision in _answers(loaded, guard, requests)]
    middle = [[tiny_vllm.middle(row[name][0] for row in scores)] for name in ("text.0", "vlm.1")]
    guard = tiny.with_thresholds(guard, middle)
    return Reference(folder, loaded, guard, requests, _answers(loaded, guard, requests))


@pytest.fixture(scope="session")
def engine(reference: Reference, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """vLLM with little room: prompts come in chunks, and requests are preempted."""
    pytest.importorskip("vllm")
    place = tmp_path_factory.mktemp("guard")
    yield tiny_vllm.engine(reference.folder, reference.guard, place, num_gpu_blocks_override=24)
    del os.environ["VLM_SAFEGUARD"]


@pytest.fixture
def runner(engine: Any) -> Any:
    """The guard of the engine's one model runner."""
    core = engine.llm_engine.engine_core.engine_core
    return core.model_executor.driver_worker.worker.model_runner._vlm_safeguard


@pytest.fixture
def scheduler(engine: Any) -> Any:
    return engine.llm_engine.engine_core.engine_core.scheduler


@pytest.fixture
def interruptible() -> Iterator[None]:
    """SIGINT interrupts the test, also where the process that runs it would ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
