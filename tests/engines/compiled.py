"""The guard in a model that vLLM compiles: the operator is in its graph, and runs each time.

``test_vllm_apart`` runs these in a process of their own.
"""

from __future__ import annotations

import json
import os
from typing import Any

import pytest
import torch

from tests.engines import tiny_vllm
from tests.engines.comparing import chat, same
from tests.engines.conftest import Reference
from tests.engines.probed import probed
from vlm_safeguard.engines.vllm import layer_operator
from vlm_safeguard.errors import GuardRuntimeError
from vlm_safeguard.guard import Guard

pytest.importorskip("vllm")


@pytest.fixture(scope="module")
def compiled(reference: Reference, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """An engine whose model is compiled, under a guard on ``LAYERS`` of the reference's."""
    layers = json.loads(os.environ.get("LAYERS", "[0, 1, 2, 3, 4, 5]"))
    guard = probed(reference).guard
    steering = guard.config.steering.model_copy(update={"layers": layers})
    config = guard.config.model_copy(update={"steering": steering})
    reference.guard = Guard(config, {name: guard.tensors[name] for name in config.shapes()})
    reference.answers = [reference.answer(request) for request in reference.requests]
    place = tmp_path_factory.mktemp("guard")
    return tiny_vllm.engine(reference.folder, reference.guard, place, enforce_eager=False)


def runner_of(engine: Any) -> Any:
    core = engine.llm_engine.engine_core.engine_core
    return core.model_executor.driver_worker.worker.model_runner


def test_a_compiled_model_answers_as_transformers_does(compiled: Any, reference: Reference) -> None:
    from vllm.config import CompilationMode

    runner = runner_of(compiled)
    compiling = runner.vllm_config.compilation_config
    assert compiling.mode in (CompilationMode.DYNAMO_TRACE_ONCE, CompilationMode.VLLM_COMPILE)
    assert compiling.backend == "inductor"
    assert runner.model.get_language_model().model.compiled
    for output, answer in zip(chat(compiled, reference.requests), reference.answers, strict=True):
        same(output, answer)
    for conversation, answer in zip(reference.requests, reference.answers, strict=True):
        same(chat(compiled, [conversation])[0], answer)


def test_a_graph_without_the_operator_answers_nothing(
    compiled: Any, reference: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where vLLM took a graph from its cache that was compiled without a guard."""
    monkeypatch.setattr(
        layer_operator._running.__class__, "step", property(lambda _: None, _ignore)
    )
    with pytest.raises(GuardRuntimeError, match=r"0 of \d guarded layers ran"):
        chat(compiled, reference.requests[:1])


def _ignore(running: Any, step: Any) -> None:
    return None


def test_the_operator_is_traced_with_what_it_changes() -> None:
    schema = torch.ops.vlm_safeguard.visit.default._schema
    changed = [one.name for one in schema.arguments if one.alias_info and one.alias_info.is_write]
    assert changed == ["hidden", "residual"]
