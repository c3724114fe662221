"""Whatever goes wrong in vLLM, no unguarded token comes out."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.engines import tiny_vllm
from tests.engines.comparing import chat, same
from tests.engines.conftest import NEW, Reference
from tests.engines.test_vllm_parity import GREEDY, front_end, vllm
from vlm_safeguard.errors import GuardRuntimeError

VLLMValidationError = pytest.importorskip("vllm.exceptions").VLLMValidationError


def blocked(output: Any, reason: str) -> None:
    assert output.finished
    assert output.outputs[0].finish_reason == "error"
    assert not output.outputs[0].token_ids
    assert not output.outputs[0].text
    with pytest.raises(GuardRuntimeError, match=reason):
        front_end.decisions(output)


@pytest.fixture(autouse=True)
def works_again(engine: Any, reference: Reference) -> Any:
    """After each fault the next requests are answered as ever."""
    yield
    for place in (0, 7):
        same(chat(engine, [reference.requests[place]])[0], reference.answers[place])


@pytest.mark.parametrize("gate", [0, 1])
def test_a_score_that_is_no_number_blocks_the_request(
    engine: Any, reference: Reference, runner: Any, monkeypatch: pytest.MonkeyPatch, gate: int
) -> None:
    from prometheus_client import REGISTRY

    def failures() -> float:
        return REGISTRY.get_sample_value("vlm_safeguard_guard_failures_total") or 0.0

    scorer, before = runner._gates.scorers[gate], failures()
    monkeypatch.setattr(scorer, "vectors", torch.full_like(scorer.vectors, torch.nan))
    for output in chat(engine, reference.requests[:8]):
        blocked(output, "NaN or Inf")
    assert failures() - before == 8


def test_only_the_request_whose_score_is_no_number_is_blocked(
    engine: Any, reference: Reference, runner: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vlm_safeguard.engines.vllm import step

    own, calls = step._ResidualStream.at, []

    def at(self: Any, places: list[int]) -> Any:
        states = own(self, places)
        calls.append(places)
        if len(calls) == 4:  # of the first text, at the gate's layer
            states[0] = torch.nan
        return states

    monkeypatch.setattr(step._ResidualStream, "at", at)
    outputs = chat(engine, reference.requests[:6])
    failed = [output.outputs[0].finish_reason == "error" for output in outputs]
    assert sum(failed) == 1
    for output, answer, is_failed in zip(outputs, reference.answers, failed, strict=False):
        if not is_failed:
            same(output, answer)


def test_a_text_that_nobody_kept_blocks_the_request(
    engine: Any, reference: Reference, runner: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner._texts, "keep", lambda text: None)
    for output in chat(engine, reference.requests[:8]):
        blocked(output, "text was not read")


def test_a_worker_that_does_not_report_blocks_the_request(
    engine: Any, reference: Reference, runner: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "take_reports", dict)
    for output in chat(engine, reference.requests[:8]):
        blocked(output, "was not read|did not report")


def test_a_worker_that_reports_on_texts_only_blocks_the_request(
    engine: Any, reference: Reference, runner: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = runner.take_reports
    monkeypatch.setattr(
        runner, "take_reports", lambda: {k: v for k, v in own().items() if "#text" in k}
    )
    for output in chat(engine, reference.requests[:8]):
        blocked(output, "did not report")


def test_a_gate_that_was_not_read_blocks_the_request(
    engine: Any, reference: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vlm_safeguard.runtime.gate import GateReading

    monkeypatch.setattr(GateReading, "read", lambda *_: None)
    for output in chat(engine, reference.requests[:8]):
        blocked(output, "a gate was not read")


def test_a_worker_with_another_guard_blocks_the_request(
    engine: Any, reference: Reference, runner: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "_digest", "0" * 64)
    for output in chat(engine, reference.requests[:8]):
        blocked(output, "another guard")


def test_nothing_of_a_failed_request_is_let_out() -> None:
    from vllm.v1.outputs import ModelRunnerOutput

    from vlm_safeguard.engines.vllm.messages import Report
    from vlm_safeguard.engines.vllm.scheduling import GuardedScheduling

    output = ModelRunnerOutput(
        req_ids=["a", "b"],
        req_id_to_index={"a": 0, "b": 1},
        sampled_token_ids=[[5], [6]],
    )
    scheduler = SimpleNamespace(_decided=set(), _shut=set(), encoder_cache_mismatch_reqs=set())
    reports = {"a": Report(failed="a reason"), "b": Report()}
    GuardedScheduling._withhold(scheduler, ["a", "b"], output, reports)
    assert output.sampled_token_ids == [[], [6]]
    assert scheduler.encoder_cache_mismatch_reqs == {"a"}


def test_a_front_end_that_hears_no_decision_stops(
    engine: Any, reference: Reference, scheduler: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vlm_safeguard.engines.vllm import scheduling

    monkeypatch.setattr(scheduling, "KEY", "elsewhere")
    with pytest.raises(GuardRuntimeError, match="no gate decided"):
        chat(engine, reference.requests[:1])
    monkeypatch.undo()
    engine.llm_engine.abort_request(
        list(engine.llm_engine.output_processor.request_states), internal=True
    )


def refused(engine: Any, prompt: dict[str, Any], reason: str, **options: Any) -> None:
    with pytest.raises(VLLMValidationError, match=reason):
        engine.generate([prompt], GREEDY, use_tqdm=False, **options)


def test_other_media_and_named_pictures_are_refused(engine: Any, reference: Reference) -> None:
    picture = reference.requests[6][0]["content"][0]["image"]
    text = "user: <image>\nIs it late?\nassistant: "
    named = {"multi_modal_data": {"image": [picture]}, "multi_modal_uuids": {"image": ["a"]}}
    refused(engine, {"prompt": text} | named, "ids of their own")
    refused(engine, {"prompt": text, "multi_modal_data": {"video": [picture]}}, "no videos")
    embedded = {"image": torch.zeros(1, 4, tiny_vllm.HIDDEN)}
    refused(engine, {"prompt": text, "multi_modal_data": embedded}, "PIL.Image")


def test_an_image_token_without_a_picture_is_refused(engine: Any) -> None:
    refused(engine, {"prompt": "user: <image>\nIs it late?\nassistant: "}, "without a picture")


@pytest.mark.parametrize("asked", [{"prompt_logprobs": 0}, {"prompt_logprobs": 1}])
def test_probabilities_inside_of_the_prompt_are_refused(engine: Any, asked: dict[str, Any]) -> None:
    """They would tell the next words of the model as it is without steering, one by one."""
    sampling = vllm.SamplingParams(max_tokens=NEW, **asked)
    with pytest.raises(VLLMValidationError, match="inside of the prompt"):
        engine.generate(["user: Hello\nassistant: "], sampling, use_tqdm=False)


def test_pictures_that_nobody_looked_at_are_refused(engine: Any, reference: Reference) -> None:
    """As tensors, in the form that vLLM's renderer gives them."""
    core, text = engine.llm_engine, "user: <image>\nIs it late?\nassistant: "
    picture = reference.requests[6][0]["content"][0]["image"]
    given = {"prompt": text, "multi_modal_data": {"image": [picture]}}
    [processed] = core.renderer.render_cmpl([given])
    assert processed.pop("vlm_safeguard") is True
    with pytest.raises(VLLMValidationError, match="processed elsewhere"):
        core.add_request("ready-made", processed, GREEDY)


def test_a_state_that_is_no_number_ends_its_request_alone(
    engine: Any, reference: Reference, runner: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At its third token, where no gate is read."""
    from vlm_safeguard.engines.vllm.step import Step

    own, seen = Step.read_logits, []

    def read_logits(self: Any, states: Any, logits: Any) -> None:
        late = [row for row in self.rows if row.columns.start == row.watched.width + 1]
        if late and not seen:
            seen.append(late[0].watched.name)
            states[late[0].number] = torch.nan
        own(self, states, logits)

    monkeypatch.setattr(Step, "read_logits", read_logits)
    outputs = chat(engine, reference.requests[:6])
    ends = [output.outputs[0].finish_reason for output in outputs]
    assert ends.count("error") == 1 and seen
    for output, answer, end in zip(outputs, reference.answers, ends, strict=False):
        if end == "error":
            assert len(output.outputs[0].token_ids) == 2
            with pytest.raises(GuardRuntimeError, match="NaN or Inf"):
                front_end.decisions(output)
        else:
            same(output, answer)


def test_logits_that_come_past_the_guard_end_the_step(runner: Any) -> None:
    """As would those of another method than the one that is watched."""
    runner._serving = True
    runner._run(SimpleNamespace(read=False))
    with pytest.raises(GuardRuntimeError, match="past the guard"):
        runner.end()
    assert runner._step is None and not runner._serving


def test_the_self_check_fails_where_no_gate_opens_or_no_state_moves(
    engine: Any, reference: Reference, runner: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vlm_safeguard.engines.vllm.self_check import check_engine
    from vlm_safeguard.engines.vllm.step import Step

    core = engine.llm_engine.engine_core.engine_core
    check_engine(reference.guard, core)
    with monkeypatch.context() as patch:
        patch.setattr(Step, "_steer", lambda *_: None)
        with pytest.raises(GuardRuntimeError, match="the states do not move"):
            check_engine(reference.guard, core)
        check_engine(reference.guard, core, monitor=True)
    own = Step._steer
    with monkeypatch.context() as patch:  # one of the layers
        patch.setattr(Step, "_steer", lambda self, layer, *_: layer == 5 or own(self, layer, *_))
        with pytest.raises(GuardRuntimeError, match="the states do not move"):
            check_engine(reference.guard, core)
    for scorer in runner._gates.scorers:
        monkeypatch.setattr(scorer, "thresholds", scorer.thresholds + 1e9)
    with pytest.raises(GuardRuntimeError, match="no gate opens"):
        check_engine(reference.guard, core)


def test_a_report_waits_for_an_output_that_vllm_threw_away() -> None:
    """As after a reset of the prefix cache while requests run: the workers report only once."""
    from vllm.v1.engine import EngineCoreOutput

    from vlm_safeguard.engines.vllm.messages import KEY, REPORT, Report
    from vlm_safeguard.engines.vllm.scheduling import guarded

    class Base:
        def __init__(self) -> None:
            coordinator = SimpleNamespace(cache_blocks=None)
            self.kv_cache_manager = SimpleNamespace(coordinator=coordinator)
            self.requests, self.thrown_away = {"a": None}, True

        def update_from_output(self, _: Any, made: Any) -> Any:
            told = [] if self.thrown_away else [EngineCoreOutput("a", made.sampled_token_ids[0])]
            return {0: SimpleNamespace(outputs=told)}

    def step(report: Report | None) -> Any:
        made = SimpleNamespace(sampled_token_ids=[[5]], req_id_to_index={"a": 0})
        if report is not None:
            setattr(made, REPORT, {"a": report})
        steps = SimpleNamespace(num_scheduled_tokens=["a"])
        return scheduler.update_from_output(steps, made)[0].outputs

    scheduler = guarded(Base)()
    assert step(Report(fired=True)) == []
    scheduler.thrown_away = False
    [output] = step(None)
    assert output.new_token_ids == [5] and output.kv_transfer_params[KEY]["fired"]
    assert step(None)[0].kv_transfer_params is None


def test_an_order_of_the_users_own_is_refused(engine: Any) -> None:
    sampling = vllm.SamplingParams(max_tokens=NEW, extra_args={"vlm_safeguard": {"texts": []}})
    with pytest.raises(VLLMValidationError, match="belongs to the guard"):
        engine.generate(["user: Hello\nassistant: "], sampling, use_tqdm=False)


def test_an_adapter_is_refused(engine: Any) -> None:
    from vllm.lora.request import LoRARequest

    adapter = LoRARequest("other", 1, "no/such/folder")
    refused(engine, {"prompt": "user: Hello\nassistant: "}, "LoRA", lora_request=adapter)


def test_a_guard_folder_that_vanishes_changes_nothing(engine: Any, reference: Reference) -> None:
    """The guard is in memory; who starts then is told, see ``test_vllm_start``."""
    folder = Path(os.environ["VLM_SAFEGUARD"])
    away = folder.rename(folder.with_name("away"))
    try:
        outputs = chat(engine, reference.requests[:8])
    finally:
        away.rename(folder)
    for output, answer in zip(outputs, reference.answers, strict=False):
        same(output, answer)


def test_beam_search_is_refused(engine: Any) -> None:
    from vllm.sampling_params import BeamSearchParams

    with pytest.raises(VLLMValidationError, match="beam search"):
        engine.beam_search(
            [{"prompt": "user: Hello\nassistant: "}], BeamSearchParams(beam_width=2, max_tokens=4)
        )


def test_a_request_past_the_guarded_front_end_is_refused(engine: Any) -> None:
    from vllm.v1.request import Request

    core = engine.llm_engine.engine_core.engine_core
    request = Request("bare", [5, 6, 7], vllm.SamplingParams(max_tokens=2), None)
    with pytest.raises(GuardRuntimeError, match="without the guard's order"):
        core.add_request(request)
    assert not core.scheduler.get_num_unfinished_requests()
