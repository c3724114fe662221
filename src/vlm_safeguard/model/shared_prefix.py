"""Runs what all requests of a chat template begin with once, and not again in every batch."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from vlm_safeguard.errors import ModelError
from vlm_safeguard.model.chat import process, render
from vlm_safeguard.model.text_only import head_in_one_piece

SHORTEST = 8  # tokens; a shorter beginning is not worth a cache
PLAIN = {"input_ids", "attention_mask", "pixel_values"}  # inputs that a prefix can be cut from
NEEDED = {"position_ids", "past_key_values", "logits_to_keep"}  # of the model's forward


class SharedPrefix:
    """Keys and values of a common beginning, for forward passes over the rest of each request.

    The beginning is what the chat template writes before a user's words, such as a system prompt:
    in short requests it can be most of the tokens. Layers with full attention are needed. A batch
    that does not begin so, or has other inputs than text and pixels, is run whole.
    """

    @torch.inference_mode()
    def __init__(self, model: Any, processor: Any) -> None:
        """Runs the beginning once, so the model must be unguarded."""
        self._model = model
        self._layers: list[tuple[Tensor, Tensor]] = []
        self.tokens = torch.empty(0)
        try:  # two requests that differ from their first word on
            texts = [render(processor, word, 0) for word in ("a", "b")]
            inputs = process(processor, texts, [(), ()])
        except ModelError:  # a family that takes no request without a picture
            return
        same = (inputs["input_ids"][0] == inputs["input_ids"][1]).long().cumprod(0)
        begin = inputs["input_ids"][0, : int(same.sum())]
        self.tokens = begin.to(model.get_input_embeddings().weight.device)  # (P,)
        if (
            len(self.tokens) < SHORTEST
            or not inputs["attention_mask"].all()
            or not set(inputs) <= PLAIN
            or not NEEDED.issubset(inspect.signature(model.forward).parameters)
        ):
            return
        cache = model(input_ids=self.tokens[None], use_cache=True).past_key_values
        # Exactly this kind, and filled: not a window, not a state, not cross-attention to pictures.
        if isinstance(cache, DynamicCache) and all(
            type(layer) is DynamicLayer and layer.is_initialized for layer in cache.layers
        ):
            self._layers = [(layer.keys, layer.values) for layer in cache.layers]

    def forward(self, inputs: dict[str, Tensor]) -> Any:
        """The model's output for inputs padded on the left, of the columns after the beginning
        where it is shared. Logits are those of the last column."""
        with head_in_one_piece(self._model):
            rest = self.rest(inputs) or inputs | {"use_cache": False}
            return self._model(**rest, logits_to_keep=1)

    def rest(self, inputs: dict[str, Tensor]) -> dict[str, Any] | None:
        """What the model's forward takes for inputs padded on the left, after the beginning; None
        where the beginning is not shared."""
        cut = self._cut(inputs)
        if cut is None:
            return None
        rows = len(cut["input_ids"])
        cache = DynamicCache()
        for number, (keys, values) in enumerate(self._layers):
            each = (rows, -1, -1, -1)
            cache.update(keys.expand(each), values.expand(each), number)
        return cut | {"past_key_values": cache, "use_cache": True}

    def _cut(self, inputs: dict[str, Tensor]) -> dict[str, Tensor] | None:
        """The inputs without the common beginning; None where they cannot be cut."""
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        length = len(self.tokens)
        if not self._layers or not set(inputs) <= PLAIN or ids.shape[1] <= length + 1:
            return None
        if ids.device != self.tokens.device:  # the model was moved since
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
