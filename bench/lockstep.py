"""Two models that answer the same requests in lockstep, to tell what hooks on one of them cost.

A machine's own speed wanders by several percent from one second to the next, more than a guard
costs. So both answer the same request at once: each forward call of one stands right beside the
same call of the other, and is divided by it.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from bench.timing import seconds
from vlm_safeguard.witness import positions_of


@dataclass(frozen=True)
class Paired:
    """One request. Seconds of the first model, and the second's over them: to the first token,
    and per token after it, the median of the steps (NaN with none)."""

    first_s: float
    per_token_s: float
    first: float
    per_token: float


class Decoding:
    """A request that one model answers, forward call by forward call, as ``generate`` calls it.

    ``inputs`` as from ``encode``, ids (B, T) padded on the left.
    """

    def __init__(self, model: Any, inputs: Mapping[str, Tensor]) -> None:
        self._model, self._mask = model, inputs["attention_mask"]
        self._places = positions_of(self._mask)
        self._cache = DynamicCache(config=model.config.get_text_config(decoder=True))
        self._next: dict[str, Tensor] = dict(inputs)
        self.logits = torch.empty(0)

    def prepare(self, tokens: Tensor) -> None:
        """Have ``tokens`` (B,) follow in the next call."""
        self._mask = torch.cat([self._mask, self._mask.new_ones(len(self._mask), 1)], 1)
        self._places = self._places[:, -1:] + 1
        self._next = {"input_ids": tokens[:, None], "attention_mask": self._mask}

    def call(self) -> None:
        """The next forward call: the prompt's, then one more token's. Leaves logits (B, V)."""
        output = self._model(
            **self._next,
            position_ids=self._places,
            past_key_values=self._cache,
            logits_to_keep=1,
        )
        self.logits = output.logits[:, -1]


@torch.inference_mode()
def answer(plain: Any, other: Any, inputs: Mapping[str, Tensor], tokens: int) -> Paired:
    """Both models read the prompt and write ``tokens`` tokens, those of the first. Which of them
    goes first changes from call to call."""
    pair = Decoding(plain, inputs), Decoding(other, inputs)
    times: list[tuple[float, float]] = []
    for number in range(tokens):
        if number:
            following = pair[0].logits.argmax(-1)
            for one in pair:
                one.prepare(following)
        if number % 2:
            late, early = seconds(pair[1].call), seconds(pair[0].call)
            times.append((early, late))
        else:
            times.append((seconds(pair[0].call), seconds(pair[1].call)))
    return paired(times)


def paired(times: list[tuple[float, float]]) -> Paired:
    """Sums up the seconds that each call took both models. A step in which the machine did
    something else does not count, because the median does."""
    (own, others), steps = times[0], times[1:]
    if not steps:
        return Paired(own, float("nan"), others / own, float("nan"))
    return Paired(
        own,
        statistics.median(one for one, _ in steps),
        others / own,
        statistics.median(two / one for one, two in steps),
    )
