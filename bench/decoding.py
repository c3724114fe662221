"""``generate``'s forward calls by hand, where only they are to be timed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from vlm_safeguard.model.text_only import positions_of


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
