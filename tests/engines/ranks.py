"""The guard on two ranks, each with half of every layer (tensor parallelism).

``test_vllm_apart`` runs these in a process of their own.
"""

from __future__ import annotations

from typing import Any

import pytest

from tests.engines import tiny_vllm
from tests.engines.comparing import chat, same
from tests.engines.conftest import Reference
from tests.engines.probed import probed

pytest.importorskip("vllm")


@pytest.fixture(scope="module")
def parallel(reference: Reference, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """An engine on two ranks, whose prompts come in chunks."""
    made = probed(reference)
    reference.guard, reference.answers = made.guard, made.answers
    return tiny_vllm.engine(
        reference.folder,
        reference.guard,
        tmp_path_factory.mktemp("guard"),
        tensor_parallel_size=2,
        distributed_executor_backend="mp",
    )


def test_each_rank_has_the_guard(parallel: Any) -> None:
    found = parallel.collective_rpc(_guard_of)
    assert found == [(True, tiny_vllm.tiny.LAYERS), (False, tiny_vllm.tiny.LAYERS)]


def test_ranks_answer_as_transformers_does(parallel: Any, reference: Reference) -> None:
    outputs = chat(parallel, reference.requests)
    for output, answer in zip(outputs, reference.answers, strict=True):
        same(output, answer)


def _guard_of(worker: Any) -> tuple[bool, int]:
    """Whether the engine core hears this rank, and how many layers are guarded on it."""
    guard = worker.model_runner._vlm_safeguard
    return guard._is_heard, len(guard._handles)
