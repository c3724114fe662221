"""Forward passes of a guarded model: the work at each guarded layer, and a check that all ran.

A ``ForwardPass`` object exists for one call of the model. What later calls need is kept on the
request.

* ``TextPass``: the text-only pass of the request, for text gates and coordinates.
* ``PromptPass``: the call in which the prompt ends. Gates in the VLM are scored at its last token.
* ``DecodePass``: a later call with rows whose gate is open.
* ``ForwardPass``: any other call. Its layers are counted, nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from vlm_safeguard.artifact.config import TextFrame
from vlm_safeguard.errors import GuardRuntimeError
from vlm_safeguard.model.kv_cache import cache_of
from vlm_safeguard.model.residual_stream import EnoughSeen, hidden_of
from vlm_safeguard.model.shared_prefix import SharedPrefix
from vlm_safeguard.model.text_only import (
    head_in_one_piece,
    kept_column,
    last_logits,
    text_pass,
)
from vlm_safeguard.model.words import readings, word_weights
from vlm_safeguard.runtime import validation
from vlm_safeguard.runtime.gate import GateReading, Gates
from vlm_safeguard.runtime.request import Request, Span
from vlm_safeguard.runtime.steering import Steerer, steer_step


class ForwardPass:
    """A call in which nothing is read or steered.

    ``layers``: guarded layers, in order. ``columns``: the columns of the padded sequence that this
    call computes. ``spans``: those that may be steered.
    """

    reads_prompt = False

    def __init__(
        self, request: Request, layers: Sequence[int], columns: range, spans: Sequence[Span] = ()
    ) -> None:
        self.request, self.layers, self.columns, self.spans = request, layers, columns, spans
        self.seen: list[int] = []

    def visit(self, layer: int, output: Any) -> Tensor | None:
        """Called after each guarded layer with its output. Returns a new residual stream (B, T, d),
        or None to change nothing."""
        self.seen.append(layer)
        return None

    def finish(self, output: Any) -> None:
        """Check that every guarded layer ran once, and record the call on the request.

        Raises:
            GuardRuntimeError: a guarded layer did not run or ran twice; ``output`` is withheld.
        """
        if self.seen != list(self.layers):
            raise GuardRuntimeError(
                f"{len(self.seen)} of {len(self.layers)} guarded layers ran: the guard's hooks "
                "were removed or bypassed, and the output is withheld"
            )
        request = self.request
        request.calls.count(len(self.seen), len(self.layers))
        if request.cache is None:
            request.cache = cache_of(output)
        request.leave(self.spans, self.columns.stop)


class PromptPass(ForwardPass):
    """The call in which the prompt ends: scores the gates at the last prompt token of every row,
    then steers."""

    reads_prompt = True

    def __init__(
        self,
        request: Request,
        layers: Sequence[int],
        columns: range,
        spans: Sequence[Span],
        gates: Gates,
        steerer: Steerer,
    ) -> None:
        super().__init__(request, layers, columns, spans)
        self._gates, self._steerer = GateReading(gates, "vlm"), steerer
        self._read_at = self._gates.layers | steerer.reads_pass
        # From the end, because a layer may put out the last columns only.
        places = [column - columns.stop for column in request.last_prompt]
        self._q: int | list[int] = places[0] if len(set(places)) == 1 else places

    def visit(self, layer: int, output: Any) -> Tensor | None:
        self.seen.append(layer)
        request, hidden = self.request, hidden_of(output)
        if hidden.shape[1] < len(self.columns):
            self._check_q_is_in(layer, hidden.shape[1])
        if layer in self._read_at:
            states = self._states_at_q(hidden)
            self._gates.read(request, layer, states)
            self._steerer.read_pass(request, layer, states)
        steered = self._steerer.steer(request, self.spans, layer, hidden, len(self.columns))
        if steered is not None:
            validation.mark_steered(request.cache)  # at once, because the call may fail
        return steered

    def finish(self, output: Any) -> None:
        super().finish(output)
        if self.request.any_open:
            validation.mark_steered(self.request.cache)

    def _check_q_is_in(self, layer: int, width: int) -> None:
        """Refuse a layer that puts out the last ``width`` columns, and not all last prompt tokens
        among them."""
        if min(self.request.last_prompt) < self.columns.stop - width:
            raise GuardRuntimeError(
                f"layer {layer} puts out the last {width} columns only, and a row's prompt ends "
                "before them: pad on the left"
            )

    def _states_at_q(self, hidden: Tensor) -> Tensor:
        """States (B, d) at the last prompt token, float32, from those of the call (B, T, d), or of
        its last columns.

        They are copied: states are kept until a gate is decided, and a view would keep all columns
        in memory.
        """
        if isinstance(self._q, int):
            return hidden[:, self._q].to(torch.float32, copy=True)
        return hidden[torch.arange(len(hidden)), torch.tensor(self._q)].float()


class DecodePass(ForwardPass):
    """A call after the prompt: steers the rows whose gate is open."""

    def __init__(
        self,
        request: Request,
        layers: Sequence[int],
        columns: range,
        spans: Sequence[Span],
        steerer: Steerer,
    ) -> None:
        super().__init__(request, layers, columns, spans)
        self._steerer = steerer

    def visit(self, layer: int, output: Any) -> Tensor | None:
        self.seen.append(layer)
        hidden = hidden_of(output)
        return self._steerer.steer(self.request, self.spans, layer, hidden, len(self.columns))


class StepPass(ForwardPass):
    """A decoding step of one token with a dose already computed for every layer."""

    def visit(self, layer: int, output: Any) -> Tensor | None:
        self.seen.append(layer)
        dose = self.request.doses[self.spans[0].step].get(layer)
        return None if dose is None else steer_step(dose, hidden_of(output))


def begin_pass(
    request: Request,
    layers: Sequence[int],
    columns: range,
    gates: Gates,
    steerer: Steerer,
) -> ForwardPass:
    """Make the pass for a request's next call, which computes ``columns``."""
    spans = steerer.spans(request, columns)
    if request.done < request.prompt_width <= columns.stop:
        return PromptPass(request, layers, columns, spans, gates, steerer)
    if not request.any_open or not spans:
        return ForwardPass(request, layers, columns, spans)
    if steerer.is_step(request, columns, spans):
        return StepPass(request, layers, columns, spans)
    return DecodePass(request, layers, columns, spans, steerer)


class TextPass(ForwardPass):
    """The text-only pass. It ends at the last layer that is needed.

    ``layers``: all guarded layers, in order. ``shared``: keys and values of what texts begin with.
    ``frame``: where the words of a text are, for gates that read their mean, and the probe behind
    it.
    """

    def __init__(
        self,
        request: Request,
        layers: Sequence[int],
        gates: Gates,
        steerer: Steerer,
        shared: SharedPrefix | None = None,
        frame: TextFrame | None = None,
    ) -> None:
        super().__init__(request, layers, range(0))
        self._shared, self._frame = shared, frame
        self._probe = len(frame.probe) if frame else 0
        self._weights: Tensor | None = None
        self._gates, self._steerer = GateReading(gates, "text", any(request.judged)), steerer
        self._all = self._gates.layers | steerer.reads_text

    @torch.no_grad()
    def run(self, model: Any, forward: Any, ids: Tensor, mask: Tensor) -> None:
        """Run the text-only version of the request: ``ids`` and ``mask`` (B, T), left-padded, with
        the probe of the frame behind it.

        Raises:
            GuardRuntimeError: a layer did not run, or a gate score is not finite.
        """
        output = None
        text = {"input_ids": ids, "attention_mask": mask}
        with suppress(EnoughSeen), head_in_one_piece(model):
            rest = self._shared.rest(text, self._probe) if self._shared else None
            given = (rest or text)["input_ids"]
            if self._frame is not None:
                self._weights = word_weights(mask.sum(1), given.shape[1], self._frame)
            if rest:
                output = forward(**rest, logits_to_keep=kept_column(self._probe))
            else:
                output = text_pass(model, ids, mask, forward, self._probe)
        self.finish(output)

    def visit(self, layer: int, output: Any) -> None:
        self.seen.append(layer)
        hidden = hidden_of(output)
        read_whole = bool(self._probe) or layer in self._gates.mean_layers
        weights = self._check_whole(hidden) if read_whole else None
        # Copied: a view would keep all columns in memory.
        state = hidden[:, -1 - self._probe].to(torch.float32, copy=True)
        seen = state
        if weights is not None and layer in self._gates.mean_layers:
            seen = readings(hidden, weights, self._probe)
        self._gates.read(self.request, layer, seen)
        self._steerer.read_text(self.request, layer, state)
        if not self._gates.reads_logits and layer == max(self._needed()):
            raise EnoughSeen

    def finish(self, output: Any) -> None:
        # A gate that reads the logits needs the whole model.
        last = max(self.layers if self._gates.reads_logits else self._needed())
        expected = [layer for layer in self.layers if layer <= last]
        if self.seen != expected:
            missing = sorted(set(expected) - set(self.seen))
            raise GuardRuntimeError(
                f"the text-only pass did not reach layers {missing}: the guard's hooks were "
                "removed or bypassed"
            )
        if self._gates.reads_logits:
            self._gates.read_logits(self.request, last_logits(output, self._probe))
        self.request.text_calls.count(len(self.seen), len(expected))

    def _check_whole(self, hidden: Tensor) -> Tensor:
        """Check that a layer puts out all columns of this pass; the weights of the words among
        them."""
        if self._weights is None or hidden.shape[1] != self._weights.shape[1]:
            raise GuardRuntimeError(
                "the request is blocked: a layer of the text-only pass does not put out all of "
                "its words, whose mean the guard reads"
            )
        return self._weights.to(hidden.device)

    def _needed(self) -> frozenset[int]:
        """Layers that the pass must reach.

        By default: the layers of the text gates, and those where steering needs coordinates. If all
        text gates stayed shut and steering needs coordinates only of rows that a text gate opened:
        the layers of the text gates.
        """
        gates = self._gates.layers
        decided = gates <= set(self.seen)
        if gates and decided and self._steerer.text_if_open and not any(self.request.fired("text")):
            return gates
        return self._all
