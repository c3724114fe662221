"""Runs what all requests of a chat template begin with once, and not again in every batch."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from vlm_safeguard.errors import ModelError
from vlm_safeguard.model.chat import encode
from vlm_safeguard.model.loading import LoadedModel
from vlm_safeguard.model.text_only import head_in_one_piece

SHORTEST = 8  # tokens; a shorter beginning is not worth a cache
PLAIN = {"input_ids", "attention_mask", "pixel_values"}  # inputs that a prefix can be cut from


class SharedPrefix:
    """Forward passes of an unguarded model that reuse the keys and values of a common beginning.

    The beginning is what the chat template writes before a user's words, such as a system prompt:
    in short requests it can be most of the tokens. Layers with full attention are needed. A batch
    that does not begin so, or has other inputs than text and pixels, is run whole.
    """

    @torch.inference_mode()
    def __init__(self, loaded: LoadedModel) -> None:
        self._model = loaded.model
        self._layers: list[tuple[Tensor, Tensor]] = []
        self.tokens = torch.empty(0)
        try:  # two requests that differ from their first word on
            inputs = encode(loaded, ["a", "b"], [None, None])
        except ModelError:  # a family that takes no request without a picture
            return
        same = (inputs["input_ids"][0] == inputs["input_ids"][1]).long().cumprod(0)
        self.tokens = inputs["input_ids"][0, : int(same.sum())]  # (P,)
        parameters = inspect.signature(loaded.model.forward).parameters
        if (
            len(self.tokens) < SHORTEST
            or not inputs["attention_mask"].all()
            or not set(inputs) <= PLAIN
            or not {"position_ids", "past_key_values"} <= set(parameters)
        ):
            return
        cache = loaded.model(input_ids=self.tokens[None], use_cache=True).past_key_values
        # Exactly this kind, and filled: not a window, not a state, not cross-attention to pictures.
        if isinstance(cache, DynamicCache) and all(
            type(layer) is DynamicLayer and layer.is_initialized for layer in cache.layers
        ):
            self._layers = [(layer.keys, layer.values) for layer in cache.layers]

    def forward(self, inputs: dict[str, Tensor]) -> Any:
        """The model's output for inputs padded on the left, of the columns after the beginning
        where it is shared. Logits are those of the last column."""
        with head_in_one_piece(self._model):
            return self._run(inputs)

    def _run(self, inputs: dict[str, Tensor]) -> Any:
        cut = self._cut(inputs)
        if cut is None:
            return self._model(**inputs, use_cache=False, logits_to_keep=1)
        rows = len(cut["input_ids"])
        cache = DynamicCache()
        for number, (keys, values) in enumerate(self._layers):
            each = (rows, -1, -1, -1)
            cache.update(keys.expand(each), values.expand(each), number)
        return self._model(**cut, past_key_values=cache, use_cache=True, logits_to_keep=1)

    def _cut(self, inputs: dict[str, Tensor]) -> dict[str, Tensor] | None:
        """The inputs without the common beginning; None where they cannot be cut."""
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        length = len(self.tokens)
        if not self._layers or not set(inputs) <= PLAIN or ids.shape[1] <= length + 1:
            return None
        begin = ids.shape[1] - mask.sum(1, keepdim=True)  # (B, 1): first column of each row
        columns = begin + torch.arange(length, device=ids.device)
        if (columns >= ids.shape[1]).any() or (ids.gather(1, columns) != self.tokens).any():
            return None
        # Every row gives up its first ``length`` tokens; padding moves between them and the rest.
        kept = mask[:, length:].clone()
        kept[torch.arange(kept.shape[1], device=ids.device) < begin] = 0
        whole = torch.cat([mask.new_ones(len(ids), length), kept], 1)
        rest = {
            "input_ids": ids[:, length:],
            "attention_mask": whole,
            "position_ids": (whole.cumsum(1) - 1)[:, length:],
        }
        return inputs | rest
