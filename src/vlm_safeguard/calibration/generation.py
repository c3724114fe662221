"""Generates responses to many requests, with or without a guard."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteriaList

from vlm_safeguard.artifact.config import Gate
from vlm_safeguard.data.inputs import Query, batches
from vlm_safeguard.guard import Guard, reads_pictures
from vlm_safeguard.model.chat import encode
from vlm_safeguard.model.loading import LoadedModel
from vlm_safeguard.model.reasoning import AnswerLimit, decoded, may_reason, opened_by
from vlm_safeguard.model.text_only import head_in_one_piece
from vlm_safeguard.runtime.attestation import Decision
from vlm_safeguard.utils.progress import Progress

REASONING = 512  # tokens of reasoning at most, before those of the answer


@dataclass(frozen=True)
class Response:
    """A model's response.

    Attributes:
        text: with the reasoning before the answer, if there is any (see ``model.reasoning``).
        tokens: number of generated tokens.
        truncated: whether it ended at the token limit.
        fired: whether a gate opened; None without a guard.
        score: the highest score of any gate, as a mean over its layers; None if none was read.
        first: the first generated token; -1 without one.
        opening: probability that the response begins with one of the ``openings`` of ``respond``.
    """

    text: str
    tokens: int
    truncated: bool
    fired: bool | None
    score: float | None = None
    first: int = -1
    opening: float = 0.0


@torch.inference_mode()
def respond(
    loaded: LoadedModel,
    items: Sequence[Query],
    guard: Guard | None = None,
    *,
    monitor: bool = False,
    max_new_tokens: int = 32,
    reasoning: int = REASONING,
    openings: Sequence[int] = (),
    batch: int = 32,
    what: str = "responses",
    progress: Progress | None = None,
) -> list[Response]:
    """Generate greedy responses to ``items``, in their order.

    ``max_new_tokens`` are those of the answer. A model that reasons first gets up to ``reasoning``
    more for that. ``openings``: tokens whose probability at the beginning is of interest. With
    ``monitor`` the guard only watches: see ``Guard.attach``.
    """
    tokenizer = loaded.processor.tokenizer
    stops = loaded.model.generation_config.eos_token_id
    ends = set(stops if isinstance(stops, list) else [stops])
    reasons = reasoning > 0 and may_reason(loaded.processor)
    found: dict[int, Response] = {}
    attached = guard.attach(loaded.model, loaded.processor, monitor) if guard else nullcontext()
    with attached as session, head_in_one_piece(loaded.model):
        groups = batches(loaded.processor.tokenizer, items, batch)
        for group in progress.track(groups, what) if progress else groups:
            chosen = [items[i] for i in group]
            texts, images = [r.text for r in chosen], [r.image for r in chosen]
            inputs = encode(loaded, texts, images, reads_pictures(guard))
            width = inputs["input_ids"].shape[1]
            tag = opened_by(tokenizer, inputs["input_ids"][0].tolist()) if reasons else ""
            watch = _FirstToken(openings)
            limit = AnswerLimit(tokenizer, width, max_new_tokens, tag)
            out = loaded.model.generate(
                **inputs,
                max_new_tokens=max_new_tokens + (reasoning if reasons else 0),
                do_sample=False,
                logits_processor=LogitsProcessorList([watch] if openings else []),
                stopping_criteria=StoppingCriteriaList([limit] if reasons else []),
            )
            decided = session.decisions if session else [None] * len(group)
            for row, index in enumerate(group):
                said = out[row, width:].tolist()[: limit.lengths.get(row)]
                stop = next((n for n, token in enumerate(said) if token in ends), None)
                said = said if stop is None else said[:stop]
                text = decoded(tokenizer, said, tag)
                fired, score = gate_of(decided[row], guard.config.gates if guard else [])
                first, opening = said[0] if said else -1, watch.found.get(row, 0.0)
                found[index] = Response(text, len(said), stop is None, fired, score, first, opening)
    return [found[i] for i in range(len(items))]


class _FirstToken(LogitsProcessor):
    """Notes for each row how probable ``openings`` are as the first token, and changes nothing."""

    def __init__(self, openings: Sequence[int]) -> None:
        self._openings, self.found = list(openings), dict[int, float]()

    def __call__(self, input_ids: Any, scores: Tensor) -> Any:
        if not self.found:
            likely = scores.float().softmax(-1)[:, self._openings].sum(-1)
            self.found = dict(enumerate(likely.tolist()))
        return scores


def gate_of(decision: Decision | None, gates: Sequence[Gate]) -> tuple[bool | None, float | None]:
    """Whether one of a guard's gates opened, and the highest score of any, as a mean over its
    layers: what would shut it if every layer's threshold were raised by so much."""
    if decision is None:
        return None, None
    scores = [decision.scores[f"{gate.source}.{index}"] for index, gate in enumerate(gates)]
    means = [sum(own) / len(gate.layers) for own, gate in zip(scores, gates, strict=True)]
    read = [mean for mean in means if not math.isnan(mean)]  # a text gate may have nothing to read
    return decision.fired, max(read, default=None)
