"""The steps of vLLM's V2 runner, which needs a GPU: its own code, with stand-ins around it.

``execute_model``, ``sample`` and ``sample_tokens`` are vLLM's, and so is the input batch. The model
mixes no tokens, so a request's states are the same in every batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests import tiny
from tests.engines import tiny_vllm
from vlm_safeguard.artifact.config import TextFrame
from vlm_safeguard.engines.vllm import arming_runners
from vlm_safeguard.engines.vllm.arming import armed
from vlm_safeguard.engines.vllm.arming_runners import arm_v2
from vlm_safeguard.engines.vllm.messages import REPORT, Report, Role, guard_digest, put
from vlm_safeguard.engines.vllm.runner import RunnerGuard
from vlm_safeguard.errors import GuardRuntimeError
from vlm_safeguard.guard import Guard

vllm = pytest.importorskip("vllm")
v2 = pytest.importorskip("vllm.v1.worker.gpu.model_runner")
from vllm.v1.core.sched.output import (  # noqa: E402
    CachedRequestData,
    NewRequestData,
    SchedulerOutput,
)
from vllm.v1.worker.gpu.input_batch import InputBatch, InputBuffers  # noqa: E402

CPU = torch.device("cpu")


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(tiny.WIDTH, tiny.WIDTH, bias=False)

    def forward(self, hidden: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        residual = hidden + residual
        return self.linear(residual).tanh(), residual


class Model(nn.Module):
    """A VLM as vLLM's are, of layers that look at one token."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(tiny.VOCAB, tiny.WIDTH)
        self.layers = nn.ModuleList(Layer() for _ in range(tiny.LAYERS))
        self.head = nn.Linear(tiny.WIDTH, tiny.VOCAB, bias=False)

    def get_language_model(self) -> nn.Module:
        return self

    def forward(self, input_ids: Tensor, **_: Any) -> Tensor:
        hidden = self.embed(input_ids)
        residual = torch.zeros_like(hidden)
        for layer in self.layers:
            hidden, residual = layer(hidden, residual)
        return hidden + residual

    def compute_logits(self, states: Tensor) -> Tensor:
        return self.head(states)


@dataclass
class Known:
    """A request in the runner."""

    tokens: list[int]
    computed: int = 0


def own(name: str) -> Any:
    """A method of vLLM's, also where this process has armed the class."""
    found = vars(v2.GPUModelRunner)[name]
    return found.__wrapped__ if armed() else found


class OnCpu(v2.GPUModelRunner):
    """Without kernels: the batch is put together here, and the most probable token is sampled."""

    execute_model = own("execute_model")
    sample = own("sample")
    sample_tokens = own("sample_tokens")

    def __init__(self, model: Model) -> None:
        self.model, self.known = model, dict[str, Known]()
        self.input_buffers = InputBuffers(16, 256, CPU)
        for name in ("kv_connector", "eplb", "step_timing", "ec_connector", "model_state",
                     "block_tables", "parallel_config", "prompt_logprobs_worker"):  # fmt: skip
            setattr(self, name, MagicMock())
        self.model_state.prepare_inputs.return_value = {}
        for name in ("aux_output_connector", "pcp_manager", "lora_config", "cudagraph_manager",
                     "ubatch_runner", "batch_sharder", "pp_handler", "speculator",
                     "rejection_sampler", "adaptive_verification", "kv_cache_config",
                     "vllm_config", "model_config", "execute_model_state"):  # fmt: skip
            setattr(self, name, None)
        self.observability_config = SimpleNamespace(cudagraph_metrics=False)
        self.is_encoder_decoder = self.uses_inputs_embeds = self.use_aux_hidden_state_outputs = (
            False
        )
        self.check_ep_fault = False
        self.is_first_pp_rank = self.is_last_pp_rank = True
        self.dcp_size = self.decode_query_len = 1
        self.num_speculative_steps = 0
        self.attn_groups, self.output_copy_stream = [], None
        self.req_states = MagicMock()
        self.sampler = lambda logits, batch: SimpleNamespace(
            sampled_token_ids=logits.argmax(1)[:, None], num_sampled=None, num_rejected=None
        )

    main_stream = dp_size = dp_rank = None

    def update_pp_decode_requests(self) -> None:
        return None

    def finish_requests(self, scheduled: Any) -> None:
        for name in scheduled.finished_req_ids | (scheduled.preempted_req_ids or set()):
            self.known.pop(name, None)

    def free_states(self, scheduled: Any) -> None:
        return None

    def add_requests(self, scheduled: Any) -> None:
        for new in scheduled.scheduled_new_reqs:
            self.known[new.req_id] = Known(list(new.prefill_token_ids), new.num_computed_tokens)

    def update_requests(self, scheduled: Any) -> None:
        cached = scheduled.scheduled_cached_reqs
        for name, computed in zip(cached.req_ids, cached.num_computed_tokens, strict=True):
            self.known[name].computed = computed

    def gather_batch_req_state(self, scheduled: Any, dummy_run: bool) -> Any:
        return SimpleNamespace(num_tokens=scheduled.total_num_scheduled_tokens, has_prefill=True), 1

    def prepare_inputs(self, scheduled: Any, *_: Any) -> InputBatch:
        counts = scheduled.num_scheduled_tokens
        ids = v2.sort_batch_req_ids(counts, {}, 1)  # decoding first, as vLLM sorts them
        starts = np.cumsum([0, *(counts[name] for name in ids)], dtype=np.int32)
        rows = [self.known[name] for name in ids]
        tokens = [
            token
            for name, row in zip(ids, rows, strict=True)
            for token in row.tokens[row.computed : row.computed + counts[name]]
        ]
        batch = InputBatch.make_dummy(len(ids), len(tokens), self.input_buffers)
        return replace(
            batch,
            req_ids=ids,
            input_ids=torch.tensor(tokens),
            query_start_loc_np=starts,
            num_computed_tokens_np=np.array([row.computed for row in rows], dtype=np.int32),
            logits_indices=torch.tensor(starts[1:] - 1).long(),
        )

    def prepare_attn(self, batch: InputBatch) -> tuple[tuple, Tensor]:
        return (), torch.zeros(0)

    def postprocess_sampled(self, *_: Any) -> None:
        return None


@pytest.fixture
def runner(guard: Guard, monkeypatch: pytest.MonkeyPatch) -> Iterator[OnCpu]:
    """A runner with an armed guard."""
    none = SimpleNamespace(
        num_ubatches=1,
        num_reqs=1,
        num_tokens=1,
        num_active_loras=0,
        max_query_len=None,
        cg_mode=vllm.config.CUDAGraphMode.NONE,
    )
    monkeypatch.setattr(v2, "dispatch_cg_and_sync_dp", lambda *_, **__: (none, None))
    monkeypatch.setattr(v2, "set_forward_context", lambda *_, **__: nullcontext())
    monkeypatch.setattr(v2, "build_slot_mappings_by_layer", lambda *_: {})
    monkeypatch.setattr(v2, "AsyncOutput", lambda **given: SimpleNamespace(**given))
    guarded = type("Armed", (OnCpu,), {
        name: vars(OnCpu)[name]
        for name in ("execute_model", "prepare_inputs", "sample", "sample_tokens")
    })  # fmt: skip
    arm_v2(guarded)
    torch.manual_seed(0)
    made = guarded(Model())
    made._vlm_safeguard = RunnerGuard(guard, made.model)
    yield made


@pytest.fixture
def guard(model: Any) -> Guard:
    """Its first text gate opens on some texts, its second on none, and steering moves the states a
    lot."""
    return tiny.guard(
        model,
        [
            tiny_vllm.text_gate(threshold=-2.0),
            tiny.gate("vlm", 4, threshold=1.6),
            tiny.gate("text", 1, 4, threshold=10.0, reads_mean=True),
        ],
        frame=TextFrame(before=0, after=0),
        layers=list(range(tiny.LAYERS)),
        rank=8,
        tokens=3,
        reference="text",
        alpha=0.0,
    )


def new(name: str, tokens: Sequence[int], role: Role, prompt: int | None = None) -> NewRequestData:
    params = vllm.SamplingParams(max_tokens=9)
    put(params, role)
    return NewRequestData(
        req_id=name, prompt_token_ids=list(tokens[:prompt]), mm_features=[],
        sampling_params=params, pooling_params=None, block_ids=([],), num_computed_tokens=0,
        lora_request=None, prefill_token_ids=list(tokens),
    )  # fmt: skip


def scheduled(
    counts: dict[str, int],
    news: Sequence[NewRequestData] = (),
    cached: dict[str, int] | None = None,
    finished: Sequence[str] = (),
    preempted: Sequence[str] = (),
) -> SchedulerOutput:
    made = SchedulerOutput.make_empty()
    made.scheduled_new_reqs, made.finished_req_ids = list(news), set(finished)
    made.preempted_req_ids = set(preempted)
    made.num_scheduled_tokens, made.total_num_scheduled_tokens = counts, sum(counts.values())
    made.scheduled_cached_reqs = CachedRequestData.make_empty()
    made.scheduled_cached_reqs.req_ids = list(cached or {})
    made.scheduled_cached_reqs.num_computed_tokens = list((cached or {}).values())
    return made


def step(
    runner: Any, counts: dict[str, int], *given: Any, **more: Any
) -> tuple[dict[str, int], dict[str, Report]]:
    """The sampled tokens and the reports of a step."""
    runner.execute_model(scheduled(counts, *given, **more))
    result = runner.sample_tokens(None)
    output = result.model_runner_output
    tokens = result.sampler_output.sampled_token_ids[:, 0].tolist()
    sampled = dict(zip(output.req_ids, tokens, strict=True))
    for name, token in sampled.items():
        known = runner.known[name]
        if known.computed + counts[name] == len(known.tokens):
            known.tokens.append(token)
    return sampled, getattr(output, REPORT, {})


PROMPTS = {"a": [7, 11, 90], "b": [5, 6, 200, 31], "c": [1, 2, 3, 4, 150]}


def role(guard: Guard, reads_for: str = "", form: int = 1, width: int = 0) -> Role:
    return Role(guard_digest(guard), reads_for, form, width, True, False, False)


def alone(runner: Any, guard: Guard, name: str, length: int) -> tuple[list[int], Report]:
    """A request in batches of its own."""
    prompt = PROMPTS[name]
    text = role(guard, name, 0, len(prompt))
    step(runner, {f"{name}#text0": 2}, [new(f"{name}#text0", prompt[-2:], text)])
    found, reports = step(
        runner, {name: len(prompt)}, [new(name, prompt, role(guard))], finished=[f"{name}#text0"]
    )
    tokens, report = [found[name]], reports[name]
    for number in range(length - 1):
        found, reports = step(runner, {name: 1}, cached={name: len(prompt) + number})
        assert not reports
        tokens.append(found[name])
    runner.execute_model(scheduled({}, finished=[name]))
    return tokens, report


def test_requests_together_in_chunks_and_preempted_answer_as_alone(
    runner: Any, guard: Guard
) -> None:
    expected = {name: alone(runner, guard, name, 4) for name in PROMPTS}
    opened = {(report.by_text, report.by_vlm) for _, report in expected.values()}
    assert opened == {(True, False), (False, True), (False, False)}
    assert not runner._vlm_safeguard.watched
    texts = [
        new(f"{name}#text0", prompt[-2:], role(guard, name, 0, len(prompt)))
        for name, prompt in PROMPTS.items()
    ]
    # Preempted after their first tokens, they come again as new ones, and once more in parts.
    ids = [text.req_id for text in texts]
    assert not step(runner, dict.fromkeys(ids, 1), texts)[1]
    assert not step(runner, dict.fromkeys(ids, 1), texts, preempted=ids)[1]
    _, reports = step(runner, dict.fromkeys(ids, 1), cached=dict.fromkeys(ids, 1))
    assert set(reports) == set(ids)
    found: dict[str, list[int]] = {name: [] for name in PROMPTS}
    told: dict[str, Report] = {}

    def take(result: tuple[dict[str, int], dict[str, Report]], *partly: str) -> None:
        for name, token in result[0].items():
            if name not in partly:
                found[name].append(token)
        told.update(result[1])

    news = [new(name, prompt, role(guard)) for name, prompt in PROMPTS.items()]
    take(step(runner, {"a": 3, "b": 4, "c": 2}, news, finished=ids), "c")
    take(step(runner, {"a": 1, "b": 1, "c": 3}, cached={"a": 3, "b": 4, "c": 2}))
    # All are preempted and come again, as V2 does it: as new ones, with their answers so far.
    resumed = {name: PROMPTS[name] + found[name] for name in PROMPTS}
    take(
        step(
            runner,
            {name: len(tokens) for name, tokens in resumed.items()},
            [
                new(name, tokens, role(guard), len(PROMPTS[name]))
                for name, tokens in resumed.items()
            ],
            preempted=list(PROMPTS),
        )
    )
    while min(map(len, found.values())) < 4:
        cached = {name: len(PROMPTS[name]) + len(found[name]) - 1 for name in PROMPTS}
        take(step(runner, dict.fromkeys(PROMPTS, 1), cached=cached))
    for name, (tokens, report) in expected.items():
        assert found[name][:4] == tokens
        assert told[name].scores == {
            gate: pytest.approx(scores, abs=1e-4, nan_ok=True)
            for gate, scores in (report.scores or {}).items()
        }


def test_an_output_that_is_being_copied_carries_the_reports(monkeypatch: Any) -> None:
    """V2 hands out such an object, and vLLM takes the plain output from it later."""
    from vllm.v1.worker.gpu.async_utils import AsyncOutput

    given = object.__new__(AsyncOutput)
    given.__dict__ |= {
        "model_runner_output": SimpleNamespace(),
        "copy_event": MagicMock(),
        "sampled_token_ids": np.array([[7]]),
        "num_sampled_tokens_np": np.array([1]),
        **dict.fromkeys(
            ("sampling_mask_tensors", "num_nans", "logprobs_tensors", "pending_aux_output",
             "_has_fault", "prompt_logprobs_dict", "prompt_token_id_logprobs_dict")
        ),
    }  # fmt: skip
    reports = {"a": Report(fired=True)}
    arming_runners._reporting(given, SimpleNamespace(take_reports=lambda: reports))
    assert getattr(given.get_output(), REPORT) == reports


def test_dummy_runs_and_warm_ups_have_no_gates(runner: Any) -> None:
    runner.prepare_dummy_attn = lambda *_: ((), torch.zeros(0))
    runner.execute_model(scheduled({"x": 1}), dummy_run=True)
    runner.execute_model_state = None
    made_up = vllm.SamplingParams(max_tokens=2)
    request = new("_warmup_0_", [1, 2], Role("", "", 0, 0, True, False, False))
    request.sampling_params = made_up
    with runner._vlm_safeguard.warming_up():
        sampled, reports = step(runner, {"_warmup_0_": 2}, [request])
    assert sampled
    assert not reports
    with pytest.raises(GuardRuntimeError, match="without the guard's order"):
        runner.execute_model(scheduled({"_warmup_0_": 2}, [request]))


def test_a_whole_cuda_graph_stops_the_runner(runner: Any, guard: Guard) -> None:
    """It replays what ran when it was captured, and no hook."""
    runner._vlm_safeguard._handles[0].remove()
    text = new("a#text0", [1, 2], role(guard, "a", 0, 3))
    with pytest.raises(GuardRuntimeError, match="5 of 6 guarded layers ran"):
        step(runner, {"a#text0": 2}, [text])


def test_a_step_that_went_round_the_guard_stops_the_runner(runner: Any, guard: Guard) -> None:
    type(runner).prepare_inputs = type(runner).prepare_inputs.__wrapped__
    text = new("a#text0", [1, 2], role(guard, "a", 0, 3))
    with pytest.raises(GuardRuntimeError, match="outside of the guarded forward pass"):
        step(runner, {"a#text0": 2}, [text])
