"""Steers the open rows of a layer's output: `add`, `restore` or `erase` at the columns of the dose.

Everything that does not change from step to step is worked out once per request and layer: which
rows, and what is put in. A decoding step is then left with the projection and a sum.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vlm_safeguard import method
from vlm_safeguard.request import Dose, Piece, Request
from vlm_safeguard.settings import Steering


class Steerer:
    """The steering of one guard. ``tensors`` as in ``Guard``; ``text_gates``: some gate reads
    the text-only pass."""

    def __init__(self, steering: Steering, tensors: dict[str, Tensor], text_gates: bool) -> None:
        self._steer, self._text_gates = steering, text_gates
        self._directions = {n: tensors[f"directions.{n}"] for n in steering.layers}
        self._anchor = {n: tensors[f"anchor.{n}"] for n in steering.layers}
        self.layers = frozenset(steering.layers)
        self.wants_text = (steering.mode == "restore" and steering.reference == "text") or (
            steering.mode == "add" and steering.query == "text"
        )

    def directions(self, layer: int, device: torch.device) -> Tensor:
        """V (m, d) of a layer, from now on where the layer's states are."""
        if self._directions[layer].device != device:
            self._directions[layer] = self._directions[layer].to(device)
        return self._directions[layer]

    def hear(self, request: Request, layer: int, state: Tensor) -> None:
        """Take the text's coordinates, where they are used, from its state (B, d) at q."""
        if self.wants_text and layer in self.layers:
            rows = self.directions(layer, state.device)
            request.text_coordinates[layer] = method.coordinates(state, rows)

    def read(self, request: Request, layer: int, state: Tensor) -> None:
        """Take the own pass's coordinates, where they are used, from its state (B, d) at q."""
        if self._steer.mode == "add" and self._steer.query == "pass" and layer in self.layers:
            rows = self.directions(layer, state.device)
            request.pass_coordinates[layer] = method.coordinates(state, rows)

    def pieces(self, request: Request) -> list[Piece]:
        """Columns of the current call that may be steered, at the prompt and behind it."""
        first, end, done, width = request.first, request.end, request.done, request.prompt_width
        steer, found = self._steer, []
        if steer.positions == "all" and first < width:
            stop = min(end, width)
            found.append(Piece(slice(0, stop - first), True, max(0, stop - max(first, done))))
        elif first < width <= end:
            q = request.q
            columns = slice(q, q + 1) if isinstance(q, int) else q
            found.append(Piece(columns, True, int(done < width)))
        stop = end if steer.tokens is None else min(end, width + steer.tokens - 1)
        start = max(first, width)
        if start < stop:
            columns = slice(start - first, stop - first)
            found.append(Piece(columns, False, max(0, stop - max(start, done))))
        return found

    def steer(self, request: Request, layer: int, hidden: Tensor) -> Tensor | None:
        """A layer's output (B, T, d) with the dose in it, or None if nothing changes."""
        changed: Tensor | None = None
        if layer not in self.layers:
            return None
        for piece in request.pieces:
            dose = request.doses.get((layer, piece.at_prompt))
            if dose is None:
                dose = self._dose(request, layer, piece.at_prompt, hidden.device)
                request.doses[layer, piece.at_prompt] = dose
            if not dose.rows:
                continue
            dose.columns += piece.new
            if hidden.shape[1] == 1:  # one decoding step: no copy, and no other piece
                return self._step(hidden, dose)
            changed = hidden.clone() if changed is None else changed
            if isinstance(piece.columns, slice):
                self._at_slice(changed, dose, piece.columns)
            else:
                own = torch.tensor([piece.columns[row] for row in dose.rows])
                rows = torch.tensor(dose.rows)
                changed[rows, own] = self._moved(changed[rows, own], dose)
        return changed

    def _step(self, hidden: Tensor, dose: Dose) -> Tensor:
        """All of (B, 1, d), or its open rows."""
        if dose.index is None:
            return self._moved(hidden.squeeze(1), dose).unsqueeze(1)
        moved = self._moved(hidden.squeeze(1).index_select(0, dose.index), dose)
        return hidden.index_copy(0, dose.index, moved.unsqueeze(1))

    def _at_slice(self, changed: Tensor, dose: Dose, columns: slice) -> None:
        view = changed[:, columns]
        if dose.index is None:
            view.copy_(self._moved(view, dose))
        else:
            view.index_copy_(0, dose.index, self._moved(view.index_select(0, dose.index), dose))

    def _moved(self, states: Tensor, dose: Dose) -> Tensor:
        """States (b, d) or (b, T, d) of the open rows, steered."""
        wide = states.float()
        if wide.ndim == 2 and dose.pull is not None and dose.directions is not None:
            # `restore` at one column, the step that counts: erase and pull in three operations.
            inside = wide @ dose.directions.T
            return torch.addmm(wide + dose.pull, inside, dose.directions, alpha=-1).to(states.dtype)
        if dose.directions is not None:
            wide = method.erase(wide, dose.directions)
        if dose.pull is not None:
            wide = wide + (dose.pull if wide.ndim == 2 else dose.pull[:, None])
        return wide.to(states.dtype)

    def _dose(self, request: Request, layer: int, at_prompt: bool, device: torch.device) -> Dose:
        """What is done at a layer; gates that count there are decided by now."""
        opened = request.open_rows(layer, at_prompt=at_prompt)
        dose = Dose([row for row, is_open in enumerate(opened) if is_open])
        if not dose.rows:
            return dose
        if len(dose.rows) < request.rows:
            dose.index = torch.tensor(dose.rows, device=device)
        directions = self.directions(layer, device)
        if self._steer.mode != "add":
            dose.directions = directions
        if self._steer.mode != "erase":
            pull = self._pull(request, layer, directions)
            dose.pull = pull if dose.index is None else pull.index_select(0, dose.index)
        return dose

    def _pull(self, request: Request, layer: int, directions: Tensor) -> Tensor:
        """What every row (B, d) would get: the formulas, of a state that is zero."""
        zero = directions.new_zeros(request.rows, 1, directions.shape[1])
        if self._steer.mode == "add":
            table = request.pass_coordinates
            table = table if self._steer.query == "pass" else request.text_coordinates
            reference = table[layer].to(directions.device)
            return method.add(zero, directions, reference, self._steer.alpha)[:, 0]
        reference = self._target(request, layer).to(directions.device)
        return method.restore(zero, directions, reference, self._steer.alpha)[:, 0]

    def _target(self, request: Request, layer: int) -> Tensor:
        """Coordinates to restore (B, m). Text that the LLM itself finds harmless holds no harm to
        put back, so where a gate reads the text, rows opened by their picture alone take the
        anchors' mean."""
        anchor = self._anchor[layer].expand(request.rows, -1)
        if self._steer.reference == "anchor":
            return anchor
        if not self._text_gates:
            return request.text_coordinates[layer]
        if layer not in request.text_coordinates:  # no row was opened by its text
            return anchor
        text = request.text_coordinates[layer]
        by_text = torch.tensor(request.open_rows(layer, "text"), device=text.device)[:, None]
        return torch.where(by_text, text, anchor.to(text.device))
