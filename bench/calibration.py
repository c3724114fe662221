"""Calibration on the anchor pairs against the bare forward passes of the same batches."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from bench.subjects import Subjects
from bench.timing import Spread, interleaved, ratios, seconds, spread
from vlm_safeguard import method
from vlm_safeguard.calibration.hidden_states import MAX_RANK
from vlm_safeguard.data import prompts
from vlm_safeguard.data.inputs import Query, batches
from vlm_safeguard.model.chat import encode
from vlm_safeguard.model.recording import record

BATCH = 32


def measured(subject: Subjects, rounds: int, pairs: int) -> dict[str, Spread]:
    """Recording the states of anchor pairs, with all layers' directions found from them, over the
    bare forward passes; and the share of the directions by themselves."""
    chosen = prompts.anchors()[:pairs]
    texts = [pair.harmful for pair in chosen] + [pair.harmless for pair in chosen]
    items = [Query(text, None) for text in texts]
    ready = [
        encode(subject.loaded, [texts[i] for i in group], [None] * len(group))
        for group in batches(subject.loaded.processor.tokenizer, items, BATCH)
    ]

    @torch.inference_mode()
    def bare() -> None:
        for inputs in ready:
            subject.loaded.model(**inputs, use_cache=False, logits_to_keep=1)

    def recorded() -> None:
        with tempfile.TemporaryDirectory() as folder:
            states = record(subject.loaded, items, Path(folder), batch=BATCH)
            _directions(states.view(2, len(chosen), *states.shape[1:]))

    noise = torch.randn(2, len(chosen), subject.vlm.depth, subject.vlm.identity.hidden_size)
    works: dict[str, Callable[[], Any]] = {
        "bare": bare,
        "recorded": recorded,
        "directions": lambda: _directions(noise),
    }
    found = interleaved(
        dict.fromkeys(works, nullcontext), lambda name: seconds(works[name]), rounds
    )
    return {
        "bare_s": spread(found["bare"]),
        "calibration": ratios(found["recorded"], found["bare"]),
        "of_it_directions": ratios(found["directions"], found["bare"]),
    }


def _directions(states: torch.Tensor) -> None:
    rank = min(MAX_RANK, states.shape[1])
    for layer in range(states.shape[2]):
        method.safety_directions(states[0, :, layer], states[1, :, layer], rank)
