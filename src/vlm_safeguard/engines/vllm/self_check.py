"""A live check of a guarded engine core, before it takes requests: a gate opens and states move."""

from __future__ import annotations

from typing import Any

from vllm.sampling_params import SamplingParams
from vllm.v1.request import Request

from vlm_safeguard.data.prompts import anchors
from vlm_safeguard.engines.vllm.identity import load_processor
from vlm_safeguard.engines.vllm.messages import KEY, Report, put
from vlm_safeguard.engines.vllm.texts import TextForms
from vlm_safeguard.errors import GuardRuntimeError
from vlm_safeguard.guard import Guard
from vlm_safeguard.model.chat import process, render

CANDIDATES = 8  # harmful anchors that are asked
_STEPS = 400  # of the engine, at most


def check_engine(guard: Guard, core: Any, monitor: bool = False) -> None:
    """Ask harmful anchors as text: a gate must open on one, and every steered layer move its state.

    Args:
        guard: the guard.
        core: vLLM's ``EngineCore``, which has no other requests.
        monitor: whether the guard only watches: then no state moves.

    Raises:
        GuardRuntimeError: no gate opens, or a layer does not move the state.
    """
    processor = load_processor(core.vllm_config.model_config)
    forms = TextForms(guard, processor)
    for number, pair in enumerate(anchors()[:CANDIDATES]):
        text = render(processor, pair.harmful)
        ids = process(processor, [text], [[]])["input_ids"][0].tolist()
        params = SamplingParams(max_tokens=1, temperature=0.0, detokenize=False)
        put(params, forms.order(ids, [], [], canary=True))
        core.add_request(
            Request(
                request_id=f"vlm-safeguard-check-{number}",
                prompt_token_ids=ids,
                sampling_params=params,
                pooling_params=None,
                block_hasher=core.request_block_hasher,
            )
        )
    reports = _answers(core)
    opened = [report for report in reports if report.fired]
    if len(reports) < CANDIDATES or not opened:
        failed = next((report.failed for report in reports if report.failed), "")
        raise GuardRuntimeError(
            f"self-check: {failed or 'no gate opens on any harmful anchor'}. Run `vlm-safeguard "
            "doctor`"
        )
    if not monitor and not any(_moves_all(guard, report) for report in opened):
        raise GuardRuntimeError("self-check: a gate opens, and the states do not move")


def _moves_all(guard: Guard, report: Report) -> bool:
    """Whether steering moved the state at every layer that it reaches at the prompt: all, or those
    from the last layer on that the gate in the VLM reads."""
    first = 0
    if not report.by_text:
        first = max(max(gate.layers) for gate in guard.config.gates if gate.source == "vlm")
    expected = {str(layer) for layer in guard.config.steering.layers if layer >= first}
    moved = {layer for layer, distance in (report.moved or {}).items() if distance > 0}
    return bool(moved) and expected <= moved


def _answers(core: Any) -> list[Report]:
    found: list[Report] = []
    for _ in range(_STEPS):
        if not core.scheduler.has_requests():
            break
        outputs, _ran = core.step_fn()
        for client in (outputs or {}).values():
            for output in client.outputs:
                written = (output.kv_transfer_params or {}).get(KEY)
                if written is not None:
                    found.append(Report(**written))
    return found
