"""Compares an answer of vLLM with that of transformers."""

from __future__ import annotations

import math
from typing import Any

from tests.engines import tiny_vllm
from tests.engines.conftest import NEW
from vlm_safeguard.runtime.attestation import Decision


def same(output: Any, answer: tuple[list[int], Decision]) -> None:
    """Check tokens and gate scores against those of transformers."""
    from vlm_safeguard.engines.vllm.front_end import decisions

    tokens, decision = answer
    found = decisions(output)[0]
    assert found.sources == decision.sources
    for gate, parts in decision.parts.items():
        for one, other in zip(parts, found.parts[gate], strict=True):
            assert (math.isnan(one) and math.isnan(other)) or abs(one - other) < 5e-3
    assert list(output.outputs[0].token_ids) == tokens


def chat(engine: Any, requests: list[Any], sampling: Any = None) -> list[Any]:
    """vLLM's answers to conversations; greedy, without ``sampling``."""
    from vllm import SamplingParams

    sampling = sampling or SamplingParams(temperature=0.0, max_tokens=NEW)
    return engine.chat([tiny_vllm.for_vllm(one) for one in requests], sampling, use_tqdm=False)
