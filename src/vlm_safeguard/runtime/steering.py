"""Steering modes: change the hidden states of rows whose gate is open.

A mode is a class in ``MODES``. It says which coordinates it needs and which it sets. What stays the
same between steps is computed once per request and layer (``Dose``), so a decoding step takes two
small matrix products, or a sum.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from vlm_safeguard import method
from vlm_safeguard.artifact.config import Steering
from vlm_safeguard.errors import GuardError, GuardRuntimeError
from vlm_safeguard.runtime.request import Dose, Request, Span


class SteeringMode:
    """Base class of the modes: sets the coordinates of open rows along the safety directions.

    Attributes:
        needs_text: whether the mode uses the coordinates of the text-only pass.
        needs_pass: whether it uses the coordinates of the request's own pass.
        text_if_open: whether it uses those of the text-only pass only for rows that a text gate
            opened.
    """

    needs_text = needs_pass = text_if_open = False

    def __init__(self, settings: Steering, anchor: Mapping[int, Tensor], text_gates: bool) -> None:
        """``anchor``: mean coordinates of the harmful anchors by layer, (m,). ``text_gates``:
        whether the guard has a text gate."""
        self.settings, self.anchor, self.text_gates = settings, anchor, text_gates

    def target(self, request: Request, layer: int, directions: Tensor) -> Tensor:
        """The coordinates (B, m) that rows get if open, on the device of ``directions``."""
        raise NotImplementedError

    def dose(self, request: Request, layer: int, rows: list[int], directions: Tensor) -> Dose:
        """The change that a layer applies to the open ``rows``."""
        return _dose(self.target(request, layer, directions), rows, directions)


class Restore(SteeringMode):
    """Restores the language model's own component: that of the text-only pass or the anchors."""

    def __init__(self, settings: Steering, anchor: Mapping[int, Tensor], text_gates: bool) -> None:
        super().__init__(settings, anchor, text_gates)
        self.needs_text = settings.reference != "anchor"
        self.text_if_open = text_gates

    def target(self, request: Request, layer: int, directions: Tensor) -> Tensor:
        reference = self._reference(request, layer).to(directions.device)
        return method.restored(reference, self.settings.alpha)

    def _reference(self, request: Request, layer: int) -> Tensor:
        """The coordinates to restore. With a text gate, rows that it did not open get the anchors'
        mean, because their text is harmless and holds no harm to restore. With reference "verdict"
        so do rows whose text the LLM would answer, because its own coordinates make no refusal.
        Other rows then get the middle between both: the own coordinates alone do not always carry
        a refusal over to a picture, and the anchors' mean alone ends some refusals."""
        anchor = self.anchor[layer].expand(request.rows, -1)
        if not self.needs_text:
            return anchor
        if not self.text_gates:
            return request.text_coordinates[layer]
        if layer not in request.text_coordinates:  # no row was opened by its text
            return anchor
        text, by_text = request.text_coordinates[layer], request.open_at(layer, "text")
        anchor = anchor.to(text.device)
        if self.settings.reference == "verdict":
            by_text = [a and b for a, b in zip(by_text, request.refused, strict=True)]
            text = (text + anchor) / 2
        if all(by_text):
            return text
        return torch.where(torch.tensor(by_text, device=text.device)[:, None], text, anchor)


class Erase(SteeringMode):
    """Removes the component. An ablation that weakens a model; never saved as a guard."""

    def target(self, request: Request, layer: int, directions: Tensor) -> Tensor:
        return directions.new_zeros(request.rows, len(directions))


class Add(SteeringMode):
    """The paper's alignment: adds the request's own component once more, ``alpha`` times."""

    def __init__(self, settings: Steering, anchor: Mapping[int, Tensor], text_gates: bool) -> None:
        super().__init__(settings, anchor, text_gates)
        self.needs_text = settings.query == "text"
        self.needs_pass = settings.query == "pass"

    def dose(self, request: Request, layer: int, rows: list[int], directions: Tensor) -> Dose:
        table = request.pass_coordinates if self.needs_pass else request.text_coordinates
        reference = table[layer].to(directions.device)
        return _dose(method.pull(reference, directions, self.settings.alpha), rows, None)


MODES: dict[str, type[SteeringMode]] = {"restore": Restore, "add": Add, "erase": Erase}


def mode_class(name: str) -> type[SteeringMode]:
    """The class of a steering mode.

    Raises:
        GuardError: no such mode is registered.
    """
    if name not in MODES:
        raise GuardError(f"unknown steering mode {name!r}: this version knows {', '.join(MODES)}")
    return MODES[name]


class Steerer:
    """The steering of one guard: its mode, layers and number of guarded tokens."""

    def __init__(self, settings: Steering, tensors: Mapping[str, Tensor], text_gates: bool) -> None:
        """``tensors`` as in ``Guard``; ``text_gates``: some gate reads the text-only pass."""
        anchor = {n: tensors[f"anchor.{n}"] for n in settings.layers}
        self._refusal: dict[int, Tensor] = {}
        if settings.later == "refusal":
            self._refusal = {
                n: method.restored(tensors[f"refusal.{n}"], settings.alpha) for n in settings.layers
            }
        self._settings = settings
        self._mode = mode_class(settings.mode)(settings, anchor, text_gates)
        self._directions = {n: tensors[f"directions.{n}"] for n in settings.layers}
        self.layers = frozenset(settings.layers)
        # Where coordinates are taken, of the text-only pass and of the request's own.
        self.reads_text = self.layers if self._mode.needs_text else frozenset()
        self.reads_pass = self.layers if self._mode.needs_pass else frozenset()
        self.text_if_open = self._mode.text_if_open

    def directions(self, layer: int, device: torch.device) -> Tensor:
        """V (m, d) of a layer, from now on where the layer's states are."""
        if self._directions[layer].device != device:
            self._directions[layer] = self._directions[layer].to(device)
        return self._directions[layer]

    def read_text(self, request: Request, layer: int, state: Tensor) -> None:
        """Take the text's coordinates, where they are used, from its state (B, d) at q."""
        if layer in self.reads_text:
            rows = self.directions(layer, state.device)
            request.text_coordinates[layer] = method.coordinates(state, rows)

    def read_pass(self, request: Request, layer: int, state: Tensor) -> None:
        """Take the own pass's coordinates, where they are used, from its state (B, d) at q."""
        if layer in self.reads_pass:
            rows = self.directions(layer, state.device)
            request.pass_coordinates[layer] = method.coordinates(state, rows)

    def spans(self, request: Request, columns: range) -> list[Span]:
        """Columns of a call that may be steered, at the prompt and behind it.

        The first guarded token is produced at q itself, the n-th at column
        ``prompt_width + n - 2``.
        Columns are absolute, so it does not matter how a sequence is cut into calls.
        """
        first, end, done, width = columns.start, columns.stop, request.done, request.prompt_width
        settings, found = self._settings, []
        if settings.positions == "all" and first < width:
            stop = min(end, width)
            found.append(Span(slice(0, stop - first), 0, max(0, stop - max(first, done))))
        elif first < width <= end:
            places = [column - first for column in request.last_prompt]
            one = len(set(places)) == 1
            at_q = slice(places[0], places[0] + 1) if one else places
            found.append(Span(at_q, 0, int(done < width)))
        stop = end if settings.tokens is None else min(end, width + settings.tokens - 1)
        start = max(first, width)
        if start >= stop:
            return found
        if not self._refusal:
            later = slice(start - first, stop - first)
            return [*found, Span(later, 1, max(0, stop - max(start, done)))]
        for column in range(start, stop):
            place = column - first
            found.append(Span(slice(place, place + 1), column - width + 1, int(done <= column)))
        return found

    def is_step(self, request: Request, columns: range, spans: Sequence[Span]) -> bool:
        """Whether a call is one more decoding step: one column behind the prompt, whose doses at
        all layers are latched."""
        return (
            len(columns) == 1
            and len(spans) == 1
            and spans[0].step > 0
            and len(request.doses[spans[0].step]) == len(self.layers)
        )

    def steer(
        self, request: Request, spans: Sequence[Span], layer: int, hidden: Tensor, width: int
    ) -> Tensor | None:
        """A layer's output (B, T, d) with the dose in it, or None if nothing changes.

        Args:
            spans: the columns to steer, of all that the call computes.
            width: how many these are. A layer may put out the last T of them only.

        Raises:
            GuardRuntimeError: all of the prompt is to be steered, and the layer leaves out columns.
        """
        changed: Tensor | None = None
        if layer not in self.layers or not request.any_open:
            return None
        if hidden.shape[1] < width:
            spans = self._of_last(spans, width - hidden.shape[1], layer)
        for span in spans:
            dose = self.dose(request, layer, span.step, hidden.device)
            if dose is None:
                continue
            if hidden.shape[1] == 1:  # no copy, and no other span
                return steer_step(dose, hidden)
            if dose.index is None and span.columns == slice(0, hidden.shape[1]):
                return _steered(hidden, dose)  # all of it: no copy, and no other span
            changed = hidden.clone() if changed is None else changed
            if isinstance(span.columns, slice):
                _steer_slice(changed, dose, span.columns)
            else:
                own = torch.tensor([span.columns[row] for row in dose.rows])
                rows = torch.tensor(dose.rows)
                changed[rows, own] = _steered(changed[rows, own], dose)
        return changed

    def _of_last(self, spans: Sequence[Span], missing: int, layer: int) -> list[Span]:
        """The spans of a layer that leaves out the first ``missing`` columns of a call. What is not
        put out is read by nothing behind it."""
        if self._settings.positions == "all" and any(span.step == 0 for span in spans):
            raise GuardRuntimeError(
                f"positions `all` cannot be guarded here: layer {layer} leaves out a part of the "
                "prompt. Use a guard with positions `generated`"
            )
        found = []
        for span in spans:
            columns = span.columns
            if isinstance(columns, slice):
                columns = slice(max(0, columns.start - missing), columns.stop - missing)
                if columns.stop <= 0:
                    continue
            else:  # all of them are there: the call has checked it
                columns = [column - missing for column in columns]
            found.append(Span(columns, span.step, span.new))
        return found

    def dose(self, request: Request, layer: int, step: int, device: torch.device) -> Dose | None:
        """The latched dose of a layer at a step (``Span``); None if no row is open. Gates that
        count there are decided by now."""
        doses = request.doses[step]
        if layer not in doses:
            opened = request.open_at(layer, at_prompt=step == 0)
            rows = [row for row, is_open in enumerate(opened) if is_open]
            doses[layer] = self._made(request, layer, step, rows, device) if rows else None
        return doses[layer]

    def _made(
        self, request: Request, layer: int, step: int, rows: list[int], device: torch.device
    ) -> Dose:
        directions = self.directions(layer, device)
        if not (step and self._refusal):
            return self._mode.dose(request, layer, rows, directions)
        if self._refusal[layer].device != device:  # once: a step does not wait for the device
            self._refusal[layer] = self._refusal[layer].to(device)
        target = self._refusal[layer][step - 1].expand(request.rows, -1)
        return _dose(target, rows, directions)


class NoSteering(Steerer):
    """Steers no layer and reads no coordinates: for a guard that only watches."""

    def __init__(self, settings: Steering, tensors: Mapping[str, Tensor], text_gates: bool) -> None:
        super().__init__(settings, tensors, text_gates)
        self.layers = self.reads_text = self.reads_pass = frozenset()


def steer_step(dose: Dose, hidden: Tensor) -> Tensor:
    """All of a decoding step's (B, 1, d) with the dose in its open rows."""
    if dose.index is None:
        return _steered(hidden.squeeze(1), dose).unsqueeze(1)
    moved = _steered(hidden.squeeze(1).index_select(0, dose.index), dose)
    return hidden.index_copy(0, dose.index, moved.unsqueeze(1))


def _dose(target: Tensor, rows: list[int], directions: Tensor | None) -> Dose:
    """A dose of the open ``rows`` out of what all rows (B, ...) would get."""
    if len(rows) == len(target):
        return Dose(rows, None, directions, target)
    index = torch.tensor(rows, device=target.device)
    return Dose(rows, index, directions, target.index_select(0, index))


def _steer_slice(changed: Tensor, dose: Dose, columns: slice) -> None:
    """Steer the open rows of (B, T, d), in place, at some columns."""
    view = changed[:, columns]
    if view.shape[1] == 1:
        view.copy_(steer_step(dose, view))
    elif dose.index is None:
        view.copy_(_steered(view, dose))
    else:
        view.index_copy_(0, dose.index, _steered(view.index_select(0, dose.index), dose))


def _steered(states: Tensor, dose: Dose) -> Tensor:
    """States (b, T, d) or (b, d) of the open rows, steered."""
    if dose.directions is None:
        return method.shift(states, dose.target)
    return method.set_coordinates(states, dose.directions, dose.target)
