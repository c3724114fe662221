"""Steers the open rows of a layer's output: `add`, `restore` or `erase` at the columns of the dose.

Everything that does not change from step to step is worked out once per request and layer: which
rows, and what is put in. A decoding step is then left with two small products, or a sum.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vlm_safeguard import method
from vlm_safeguard.artifact.config import Steering
from vlm_safeguard.runtime.request import Dose, Piece, Request


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
        own = steering.mode == "add" and steering.query == "pass"
        self.reads = self.layers if own else frozenset()  # where the own pass's state is used

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
        if layer in self.reads:
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
        if layer not in self.layers or not request.any_open:
            return None
        for piece in request.pieces:
            doses = request.prompt_doses if piece.at_prompt else request.later_doses
            if layer not in doses:
                doses[layer] = self._dose(request, layer, piece.at_prompt, hidden.device)
            dose = doses[layer]
            if dose is None:
                continue
            if hidden.shape[1] == 1:  # no copy, and no other piece
                return step(dose, hidden)
            if dose.index is None and piece.columns == slice(0, hidden.shape[1]):
                return _moved_at(hidden, dose)  # all of it: no copy, and no other piece
            changed = hidden.clone() if changed is None else changed
            if isinstance(piece.columns, slice):
                _at_slice(changed, dose, piece.columns)
            else:
                own = torch.tensor([piece.columns[row] for row in dose.rows])
                rows = torch.tensor(dose.rows)
                changed[rows, own] = _moved(changed[rows, own], dose)
        return changed

    def one_more_step(self, request: Request) -> bool:
        """Whether the current call is one more decoding step: one column, whose doses at all layers
        are those of an earlier one."""
        return (
            request.end - request.first == 1
            and len(request.pieces) == 1
            and not request.pieces[0].at_prompt
            and len(request.later_doses) == len(self.layers)
        )

    def _dose(
        self, request: Request, layer: int, at_prompt: bool, device: torch.device
    ) -> Dose | None:
        """What is done at a layer; gates that count there are decided by now."""
        given = request.shares(layer, at_prompt=at_prompt)
        rows = [row for row, share in enumerate(given) if share]
        if not rows:
            return None
        shares, share = [given[row] for row in rows], None
        directions = self.directions(layer, device)
        if self._steer.mode == "add":
            target = self._pull(request, layer, directions)
        elif self._steer.mode == "erase":
            target = directions.new_zeros(request.rows, len(directions))
        else:
            target = self._target(request, layer).to(device)
            if self._steer.alpha:
                target = (1 + self._steer.alpha) * target
        index = None
        if len(rows) < request.rows:
            index = torch.tensor(rows, device=device)
            target = target.index_select(0, index)
        if min(shares) < 1:
            share = target.new_tensor(shares)[:, None]
        if self._steer.mode == "add":  # a part of a sum is the sum of a part
            target = target if share is None else share * target
            return Dose(rows, index, None, target, None, shares)
        return Dose(rows, index, directions, target, share, shares)

    def _pull(self, request: Request, layer: int, directions: Tensor) -> Tensor:
        """What `add` puts into every row (B, d): its formula, of a state that is zero."""
        own = self._steer.query == "pass"
        table = request.pass_coordinates if own else request.text_coordinates
        zero = directions.new_zeros(request.rows, 1, directions.shape[1])
        reference = table[layer].to(directions.device)
        return method.add(zero, directions, reference, self._steer.alpha)[:, 0]

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
        text, by_text = request.text_coordinates[layer], request.shares(layer, "text")
        if all(by_text):
            return text
        rows = torch.tensor(by_text, device=text.device)[:, None] > 0
        return torch.where(rows, text, anchor.to(text.device))


def step(dose: Dose, hidden: Tensor) -> Tensor:
    """All of a decoding step's (B, 1, d) with the dose in its open rows."""
    if dose.index is None:
        return _moved(hidden.squeeze(1), dose).unsqueeze(1)
    moved = _moved(hidden.squeeze(1).index_select(0, dose.index), dose)
    return hidden.index_copy(0, dose.index, moved.unsqueeze(1))


def _moved(states: Tensor, dose: Dose) -> Tensor:
    """States (b, d) of the open rows at one column, steered.

    `erase` and `restore` are two operations that count: the change of the coordinates, and putting
    it in.
    """
    wide = states.float()
    if dose.directions is None:
        wide = wide + dose.target
    else:
        change = torch.addmm(dose.target, wide, dose.directions.T, alpha=-1)
        if dose.share is not None:
            change = change * dose.share
        wide = torch.addmm(wide, change, dose.directions)
    return wide.to(states.dtype)


def _at_slice(changed: Tensor, dose: Dose, columns: slice) -> None:
    """Steer the open rows of (B, T, d), in place, at some columns."""
    view = changed[:, columns]
    if view.shape[1] == 1:
        view.copy_(step(dose, view))
    elif dose.index is None:
        view.copy_(_moved_at(view, dose))
    else:
        view.index_copy_(0, dose.index, _moved_at(view.index_select(0, dose.index), dose))


def _moved_at(states: Tensor, dose: Dose) -> Tensor:
    """States (b, T, d) of the open rows at some columns, steered."""
    if dose.directions is None:
        return (states.float() + dose.target[:, None]).to(states.dtype)
    return method.restore(states, dose.directions, dose.target, 0.0, dose.share)
