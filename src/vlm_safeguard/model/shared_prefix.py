"""Caches keys and values of the prefix that all requests of a chat template share."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from vlm_safeguard.model.kv_cache import NAME, cache_of
from vlm_safeguard.model.positions import rescales
from vlm_safeguard.model.residual_stream import find_decoder
from vlm_safeguard.model.text_only import head_in_one_piece, kept_column
from vlm_safeguard.model.weights import input_device
from vlm_safeguard.model.words import unlike_requests

SHORTEST = 8  # tokens; a shorter beginning is not worth a cache
PLAIN = {"input_ids", "attention_mask", "pixel_values"}  # inputs that a prefix can be cut from
NEEDED = {"position_ids", NAME, "logits_to_keep"}  # of the model's forward


class SharedPrefix:
    """Keys and values of a common beginning, for forward passes over the rest of each request.

    The beginning is what the chat template writes before a user's words, such as a system prompt:
    in short requests it can be most of the tokens. Layers with full attention are needed. A batch
    that does not begin so, or has other inputs than text and pixels, is run whole, and so is any
    batch if the model is in training mode or its weights are no longer the same.
    """

    @torch.no_grad()
    def __init__(self, model: Any, processor: Any) -> None:
        """Runs the beginning once, so the model must be unguarded."""
        self._model = model
        self._layers: list[tuple[Tensor, Tensor]] = []
        self.tokens = torch.empty(0)
        inputs = unlike_requests(processor)
        if inputs is None:
            return
        same = (inputs["input_ids"][0] == inputs["input_ids"][1]).long().cumprod(0)
        begin = inputs["input_ids"][0, : int(same.sum())]
        self.tokens = begin.to(input_device(model))  # (P,)
        if (
            len(self.tokens) < SHORTEST
            or not inputs["attention_mask"].all()
            or not set(inputs) <= PLAIN
            or model.training
            or rescales(model)  # keys would depend on the length of the whole
            or not _takes_positions(model)
        ):
            return
        ids = self.tokens[None]
        output = model(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            position_ids=torch.arange(len(begin), device=ids.device)[None],
            use_cache=True,
            return_dict=True,
            logits_to_keep=1,
        )
        cache = cache_of(output)
        # Exactly this kind, and filled: not a window, not a state, not cross-attention to pictures.
        if isinstance(cache, DynamicCache) and all(
            type(layer) is DynamicLayer and layer.is_initialized for layer in cache.layers
        ):
            self._layers = [(layer.keys, layer.values) for layer in cache.layers]
            self._weights = _versions(model)

    def forward(self, inputs: dict[str, Tensor], behind: int = 0) -> Any:
        """The model's output for inputs padded on the left, of the columns after the beginning
        where it is shared. Logits are those of the last column, or of that with ``behind`` more
        after it."""
        with head_in_one_piece(self._model):
            rest = self.rest(inputs, behind) or inputs | {"use_cache": False}
            return self._model(**rest, logits_to_keep=kept_column(behind))

    def rest(self, inputs: dict[str, Tensor], behind: int = 0) -> dict[str, Any] | None:
        """What the model's forward takes for inputs padded on the left, after the beginning, with
        logits as in ``forward``; None where the beginning is not shared."""
        cut = self._cut(inputs, behind)
        if cut is None:
            return None
        cache = DynamicCache()
        cache.layers = [_Begun(*layer, len(cut["input_ids"])) for layer in self._layers]
        return cut | {NAME: cache, "use_cache": True}

    def _cut(self, inputs: dict[str, Tensor], behind: int) -> dict[str, Tensor] | None:
        """The inputs without the common beginning; None where they cannot be cut."""
        ids, mask = inputs["input_ids"], inputs["attention_mask"].bool().long()
        length, width = len(self.tokens), ids.shape[1] - behind
        if not self._layers or not set(inputs) <= PLAIN or width <= length + 1:
            return None
        if self._model.training or _versions(self._model) != self._weights:
            return None
        begin = ids.shape[1] - mask.sum(1, keepdim=True)  # (B, 1): first column of each row
        columns = begin + torch.arange(length, device=ids.device)
        # A row needs a token between the beginning and those that come ``behind``.
        if (begin + length >= width).any() or (ids.gather(1, columns) != self.tokens).any():
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


class _Begun(DynamicLayer):
    """A layer's keys and values (1, heads, P, size) of the beginning, for one forward call of so
    many rows: what the call adds is not kept."""

    def __init__(self, keys: Tensor, values: Tensor, rows: int) -> None:
        super().__init__()
        self.lazy_initialization(keys, values)
        each = (rows, -1, -1, -1)
        self.keys, self.values = keys.expand(each), values.expand(each)

    def update(
        self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        keys = torch.cat([self.keys, key_states], dim=-2)
        return keys, torch.cat([self.values, value_states], dim=-2)


def _takes_positions(model: Any) -> bool:
    """Whether positions come from ``position_ids``, and no other input tells text from pictures:
    then padding may stand between the beginning and the rest."""
    takes = set(inspect.signature(model.forward).parameters)
    inside = inspect.signature(find_decoder(model).module.forward).parameters
    return takes >= NEEDED and "token_type_ids" not in takes and "position_ids" in inside


def _versions(model: Any) -> list[tuple[int, int]]:
    """Where each weight lies and how often it was changed in place."""
    return [
        (
            0 if is_traceable_wrapper_subclass(p) else p.data_ptr(),  # quantised: it has no place
            0 if p.is_inference() else p._version,
        )
        for p in model.parameters()
    ]
