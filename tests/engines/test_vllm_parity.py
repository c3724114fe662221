"""vLLM under guard answers as transformers under guard does, however requests are batched."""

from __future__ import annotations

from typing import Any

import pytest
from PIL import Image

from tests import tiny
from tests.engines import tiny_vllm
from tests.engines.comparing import chat, same
from tests.engines.conftest import NEW, Reference

vllm = pytest.importorskip("vllm")
front_end = pytest.importorskip("vlm_safeguard.engines.vllm.front_end")
GREEDY = vllm.SamplingParams(temperature=0.0, max_tokens=NEW)


def test_the_references_gates_open_on_some_requests_and_not_on_others(reference: Reference) -> None:
    sources = {decision.sources for _, decision in reference.answers}
    assert {(), ("text",), ("vlm",)} <= sources


def test_a_mixed_batch_answers_as_transformers_does(
    engine: Any, reference: Reference, scheduler: Any
) -> None:
    for output, answer in zip(chat(engine, reference.requests), reference.answers, strict=True):
        same(output, answer)


def test_requests_alone_answer_as_in_a_batch(engine: Any, reference: Reference) -> None:
    for conversation, answer in zip(reference.requests, reference.answers, strict=True):
        same(chat(engine, [conversation])[0], answer)


def test_preempted_requests_are_steered_again(
    engine: Any, reference: Reference, scheduler: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    preempted = []
    own = type(scheduler)._preempt_request

    def preempt(self: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        preempted.append(request.request_id)
        return own(self, request, *args, **kwargs)

    monkeypatch.setattr(type(scheduler), "_preempt_request", preempt)
    for output, answer in zip(
        chat(engine, reference.requests * 2), reference.answers * 2, strict=True
    ):
        same(output, answer)
    assert preempted


def raw_prompts(reference: Reference) -> list[Any]:
    """The reference's requests for ``LLM.generate``."""
    prompts = []
    for conversation in reference.requests:
        pictures = [p["image"] for p in conversation[0]["content"] if p["type"] == "image"]
        text = reference.loaded.processor.apply_chat_template(
            conversation, add_generation_prompt=True, tokenize=False
        )
        prompts.append(
            {"prompt": text} | ({"multi_modal_data": {"image": pictures}} if pictures else {})
        )
    return prompts


def test_raw_prompts_are_guarded(engine: Any, reference: Reference) -> None:
    outputs = engine.generate(raw_prompts(reference), GREEDY, use_tqdm=False)
    for output, answer in zip(outputs, reference.answers, strict=True):
        same(output, answer)


@pytest.mark.parametrize("seed", [3, None])  # without one the answers share their parameters
def test_several_answers_of_one_request_are_each_guarded(
    engine: Any, reference: Reference, seed: int | None
) -> None:
    sampling = vllm.SamplingParams(temperature=1.0, seed=seed, n=3, max_tokens=2)
    output = chat(engine, [reference.requests[0]], sampling)[0]
    found = front_end.decisions(output)
    assert len(found) == len(output.outputs) == 3
    assert {decision.sources for decision in found} == {reference.answers[0][1].sources}


def test_a_later_turn_finds_no_steered_states_in_the_prefix_cache(
    engine: Any, reference: Reference
) -> None:
    opened = [
        conversation
        for conversation, (_, decision) in zip(reference.requests, reference.answers, strict=True)
        if decision.fired and len(conversation[0]["content"]) == 1
    ]
    long = vllm.SamplingParams(
        temperature=0.0, max_tokens=60, ignore_eos=True, logit_bias={tiny.IMAGE: -100.0}
    )
    assert opened
    for conversation in opened[:3]:
        first = chat(engine, [conversation], long)[0]
        ids = [*first.prompt_token_ids, *first.outputs[0].token_ids, *first.prompt_token_ids[:5]]
        second = engine.generate([{"prompt_token_ids": ids}], GREEDY, use_tqdm=False)[0]
        assert second.num_cached_tokens  # of the prompt, up to the block of its last token
        same(second, reference.of_ids(ids))


def test_nothing_of_a_request_stays(engine: Any, reference: Reference, runner: Any) -> None:
    core = engine.llm_engine
    for number, conversation in enumerate(reference.requests):
        text = reference.loaded.processor.apply_chat_template(
            conversation[0]["content"][-1:] and tiny_vllm.conversation("Hello?"),
            add_generation_prompt=True,
            tokenize=False,
        )
        core.add_request(f"aborted-{number}", {"prompt": text}, GREEDY)
        for _ in range(number % 4):
            core.step()
        core.abort_request([f"aborted-{number}"])
    same(chat(engine, reference.requests[:1])[0], reference.answers[0])
    same(chat(engine, reference.requests[1:2])[0], reference.answers[1])
    assert len(runner.watched) <= 3  # what ended last is forgotten with the next step
    assert not len(runner._texts)


@pytest.mark.parametrize("way", ["chat", "generate"])
def test_counters_of_vllm_count_what_was_guarded(
    engine: Any, reference: Reference, way: str
) -> None:
    from prometheus_client import REGISTRY

    names = ("requests", "guarded_tokens", "gate_openings")

    def counts() -> list[float]:
        return [
            sum(
                sample.value
                for metric in REGISTRY.collect()
                if metric.name == f"vlm_safeguard_{name}"
                for sample in metric.samples
                if sample.name.endswith("_total")
            )
            for name in names
        ]

    before = counts()
    if way == "chat":
        chat(engine, reference.requests)
    else:
        engine.generate(raw_prompts(reference), GREEDY, use_tqdm=False)
    opened = sum(len(decision.sources) for _, decision in reference.answers)
    tokens = sum(len(tokens) for tokens, _ in reference.answers)
    expected = [len(reference.requests), tokens, opened]
    assert [after - known for after, known in zip(counts(), before, strict=True)] == expected


def test_a_picture_of_another_mode_is_what_the_guard_and_the_model_see(
    engine: Any, reference: Reference
) -> None:
    clear = Image.new("RGBA", (40, 30), (200, 10, 10, 0))
    conversation = tiny_vllm.conversation("Is it late?", clear)
    same(chat(engine, [conversation])[0], reference.answer(conversation))
