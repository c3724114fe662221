"""The text-only pass of a request: what the language model alone says of its words."""

from __future__ import annotations

from collections import deque
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from vlm_safeguard.artifact.config import GuardConfig
from vlm_safeguard.errors import GuardRuntimeError
from vlm_safeguard.model.loading import EnoughSeen
from vlm_safeguard.model.text_only import text_only, text_pass
from vlm_safeguard.runtime.gate import GateReader
from vlm_safeguard.runtime.request import Request
from vlm_safeguard.runtime.steering import Steerer


class TextPass:
    """Runs the model on the text of a request; the guarded layers' hooks hand it their states.

    ``layers``: all guarded layers, in order. ``seen`` holds those whose hooks ran in the pass.
    """

    def __init__(
        self,
        config: GuardConfig,
        model: Any,
        gates: GateReader,
        steerer: Steerer,
        seen: deque[int],
    ) -> None:
        self._model, self._gates, self._steerer, self._seen = model, gates, steerer, seen
        self._mode, self._pad_id = config.steering.mode, config.markup.pad_id
        self._gate_layers = gates.layers("text")
        self.layers = self._gate_layers | (steerer.layers if steerer.wants_text else frozenset())
        self.request: Request | None = None  # the one whose text is being read

    def read(self, request: Request, ids: Tensor | None, guarded: list[int]) -> None:
        """Read a request with prompt ``ids`` (B, T), unless the caller gave its text-only reading;
        ``guarded``: layers with a hook, in order.

        Raises:
            GuardRuntimeError: a row has no text, a layer did not run, or a score is not finite.
        """
        if request.text is not None:
            self._ask_witness(request, *request.text)
        else:
            self._ask_witness(request, *self._derived(request, ids))
        expected = self._expected(request, guarded)
        if list(self._seen) != expected:
            missing = sorted(set(expected) - set(self._seen))
            raise GuardRuntimeError(f"the text-only pass did not reach layers {missing}")
        request.text_calls.count(len(self._seen), len(expected))

    def _derived(self, request: Request, ids: Tensor | None) -> tuple[Tensor, Tensor]:
        """The text-only reading, ids and mask, out of the prompt's own ids."""
        columns = request.text_columns
        if ids is None or columns is None or not bool(columns.any(1).all()):
            raise GuardRuntimeError("a row of the batch holds no text beside its pictures")
        return text_only(ids, columns, self._pad_id)

    @torch.no_grad()
    def _ask_witness(self, request: Request, ids: Tensor, mask: Tensor) -> None:
        self.request = request
        self._seen.clear()
        try:
            with suppress(EnoughSeen):
                text_pass(self._model, ids, mask)
        finally:
            self.request = None

    def hear(self, layer: int, hidden: Tensor) -> None:
        """Read one layer (B, T, d) at the last token; ends the pass once it has said enough."""
        request = self.request
        if request is None:
            raise GuardRuntimeError("the text-only pass is over")
        state = hidden[:, -1].to(torch.float32, copy=True)  # what is kept keeps not all columns
        self._gates.read(request, "text", layer, state)
        self._steerer.hear(request, layer, state)
        if layer == max(self._needed(request)):
            raise EnoughSeen

    def _needed(self, request: Request) -> frozenset[int]:
        """Layers to reach: where every text gate stayed shut, ``restore`` takes the anchors'
        coordinates (see ``Steerer``) and the text's are not used."""
        undecided = not self._gate_layers <= set(self._seen)
        wants = self._steerer.wants_text and (
            self._mode == "add" or not self._gate_layers or undecided or any(request.fired("text"))
        )
        return self.layers if wants else self._gate_layers

    def _expected(self, request: Request, guarded: list[int]) -> list[int]:
        """Guarded layers whose hooks run in a pass that ends as soon as it may."""
        last = max(self._needed(request))
        return [layer for layer in guarded if layer <= last]
