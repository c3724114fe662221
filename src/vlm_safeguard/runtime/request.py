"""The state of one request: what its prompt decided, per row of the batch, latched.

One request is a ``generate`` call, or a forward pass that starts without a cache. Its state is
made anew at each start and dropped at the end, so nothing can leak into the next.

A row is known by its place alone. A loop of one's own that moves rows between its forward calls
(``cache.reorder_cache``) must not move them between prompts: nothing here would learn of it.
Beam search may, inside ``generate``: it moves rows among the beams of one prompt.

What is decided is kept on the host, in lists: a decoding step then needs no look at the device to
know which rows are open.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from vlm_safeguard.artifact.config import Gate
from vlm_safeguard.method import dose_share

_T = TypeVar("_T")


@dataclass(frozen=True)
class Piece:
    """Columns that steering may change in one forward call.

    ``columns`` are places in the call. Where the rows' prompts end at different places (padding
    on the right), they are one column per row instead. ``new`` of them, in each row, no earlier
    call of the request has gone through.
    """

    columns: slice | list[int]
    at_prompt: bool
    new: int


@dataclass
class Dose:
    """What a layer does to the rows that are open there, latched.

    ``index`` (b,) is None if every row of the batch is. Their coordinates along ``directions``
    (m, d) become ``target`` (b, m); without directions ``target`` (b, d) is added to the states.
    ``share`` (b, 1) is how much of the way their coordinates go there, None for all of it.
    ``shares``: which part of the dose each of ``rows`` gets.
    """

    rows: list[int]
    index: Tensor | None
    directions: Tensor | None
    target: Tensor
    share: Tensor | None
    shares: list[float]


@dataclass
class Calls:
    """Hook calls of guarded layers, made and expected, and the forward calls they belong to."""

    made: int = 0
    expected: int = 0
    passes: int = 0

    def count(self, made: int, expected: int) -> None:
        self.made += made
        self.expected += expected
        self.passes += 1


@dataclass
class Request:
    """State of one request of B rows whose padded prompt has ``prompt_width`` columns.

    Columns are absolute places in the padded sequence, never relative to a forward call.
    """

    gates: list[Gate]
    prompt_width: int
    last_prompt: list[int]  # column of q in each row
    padding: list[int]  # prompt columns in each row that hold no token
    text_columns: Tensor | None = None  # (B, T) columns of the text-only reading
    text: tuple[Tensor, Tensor] | None = None  # its ids and mask (B, T'), given by the caller
    soft: float = 0.0  # width of the gates, see ``Steering``
    # By gate, then row: one score per layer, NaN if not read yet; which part of the dose it gives,
    # 0 where it is shut, per layer too unless the gate is pooled.
    scores: dict[int, list[list[float]]] = field(default_factory=dict)
    opened: dict[int, list[list[float]]] = field(default_factory=dict)
    states: dict[int, dict[int, Tensor]] = field(default_factory=dict)  # of gates still undecided
    text_coordinates: dict[int, Tensor] = field(default_factory=dict)  # by layer, (B, m)
    pass_coordinates: dict[int, Tensor] = field(default_factory=dict)
    # By layer, None where no row is open: at the prompt's own columns, and behind them.
    prompt_doses: dict[int, Dose | None] = field(default_factory=dict)
    later_doses: dict[int, Dose | None] = field(default_factory=dict)
    text_calls: Calls = field(default_factory=Calls)
    calls: Calls = field(default_factory=Calls)
    cache: Any = None
    # The current forward call: its first column, one past its last, where it may be steered.
    first: int = 0
    end: int = 0
    q: int | list[int] = 0  # place in it of the last prompt token, per row where they differ
    pieces: list[Piece] = field(default_factory=list)
    done: int = 0  # columns that finished calls have gone through
    # Those of them that may be steered: of the prompt, and behind it.
    prompt_columns: int = 0
    later_columns: int = 0
    any_open: bool = False  # whether a gate of any row is, of those decided by now

    def __post_init__(self) -> None:
        for index, gate in enumerate(self.gates):
            self.scores[index] = [[math.nan] * len(gate.layers) for _ in self.last_prompt]

    @property
    def rows(self) -> int:
        return len(self.last_prompt)

    @property
    def reads_prompt(self) -> bool:
        """Whether the prompt ends in the current call: gates are read, coordinates taken."""
        return self.done < self.prompt_width <= self.end

    @property
    def decided(self) -> bool:
        return self.done >= self.prompt_width

    def enter(self, first: int, end: int) -> None:
        """Go on to the forward call of columns ``first`` up to ``end``."""
        self.first, self.end = first, end
        places = [column - first for column in self.last_prompt]
        self.q = places[0] if len(set(places)) == 1 else places

    def leave(self) -> None:
        """The forward call ran to its end."""
        for piece in self.pieces:
            if piece.at_prompt:
                self.prompt_columns += piece.new
            else:
                self.later_columns += piece.new
        self.done = self.end

    def states_at_q(self, hidden: Tensor) -> Tensor:
        """States (B, d), float32, at the last prompt token, from all of the call's (B, T, d).

        A copy: while gates are undecided they are kept, and must not keep all columns with them.
        """
        if isinstance(self.q, int):
            return hidden[:, self.q].to(torch.float32, copy=True)
        return hidden[torch.arange(self.rows), torch.tensor(self.q)].float()

    def repeat(self, times: int) -> None:
        """One row per beam or returned sequence, in the order generate expands them."""
        self.last_prompt, self.padding = _each(self.last_prompt, times), _each(self.padding, times)
        if self.text_columns is not None:
            self.text_columns = self.text_columns.repeat_interleave(times, 0)
        for of_gates in (self.scores, self.opened):
            for index, table in of_gates.items():  # rows of their own: each is latched by itself
                of_gates[index] = [list(values) for values in _each(table, times)]
        for layer, found in self.text_coordinates.items():
            self.text_coordinates[layer] = found.repeat_interleave(times, 0)

    def latch(self, index: int, place: int | None, scores: list[list[float]]) -> None:
        """Keep the scores of a gate, per row: of its layer number ``place``, or of all layers."""
        if place is None:
            self.scores[index] = scores
            opened = [[dose_share(sum(values), self.soft)] for values in scores]
            self.opened[index] = opened
        else:
            known = self.scores[index]
            opened = self.opened.setdefault(index, [[0.0] * len(row) for row in known])
            for row, [score] in enumerate(scores):
                known[row][place] = score
                opened[row][place] = dose_share(score, self.soft)
        self.any_open = self.any_open or any(any(shares) for shares in opened)

    def shares(self, layer: int, source: str | None = None, at_prompt: bool = False) -> list[float]:
        """Which part of the dose the rows get at a layer: the most that any gate gives, or any of
        one source; 0 where all are shut.

        At the prompt's own columns a pooled gate of the request's own pass acts from its last
        layer on, because below that it is not decided yet; so it is in every later call.
        """
        rows = [0.0] * self.rows
        for index, opened in self.opened.items():
            gate, place = self.gates[index], 0
            if source not in (None, gate.source):
                continue
            if gate.per_layer:
                if layer not in gate.layers:
                    continue
                place = gate.layers.index(layer)
            elif at_prompt and gate.source == "vlm" and layer < max(gate.layers):
                continue
            rows = [max(known, own[place]) for known, own in zip(rows, opened, strict=True)]
        return rows

    def fired(self, source: str | None = None) -> list[bool]:
        """Which rows any gate of a source, or at all, opened at any layer."""
        rows = [False] * self.rows
        for index, opened in self.opened.items():
            if source in (None, self.gates[index].source):
                rows = [known or any(own) for known, own in zip(rows, opened, strict=True)]
        return rows


def _each(values: list[_T], times: int) -> list[_T]:
    return [value for value in values for _ in range(times)]
