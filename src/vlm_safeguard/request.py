"""The state of one request: what its prompt decided, per row of the batch, latched.

One request is a ``generate`` call, or a forward pass that starts without a cache. Its state is
made anew at each start and dropped at the end, so nothing can leak into the next.

What is decided is kept on the host: a decoding step then needs no look at the device to know
which rows are open.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from vlm_safeguard.settings import Gate


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

    ``index`` (b,) is None if every row of the batch is. ``directions`` (m, d) are taken out and
    ``pull`` (b, d) is put in, each unless None; ``columns`` counts the columns changed in a row.
    """

    rows: list[int]
    index: Tensor | None = None
    directions: Tensor | None = None
    pull: Tensor | None = None
    columns: int = 0


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
    # By gate; scores not read yet are NaN. A pooled gate opens rows, (B, 1), the others (B, n).
    scores: dict[int, Tensor] = field(default_factory=dict)
    opened: dict[int, Tensor] = field(default_factory=dict)
    states: dict[int, dict[int, Tensor]] = field(default_factory=dict)  # of gates still undecided
    text_coordinates: dict[int, Tensor] = field(default_factory=dict)  # by layer, (B, m)
    pass_coordinates: dict[int, Tensor] = field(default_factory=dict)
    doses: dict[tuple[int, bool], Dose] = field(default_factory=dict)  # by layer and `at_prompt`
    text_calls: Calls = field(default_factory=Calls)
    calls: Calls = field(default_factory=Calls)
    cache: Any = None
    # The current forward call: its first column, one past its last, where it may be steered.
    first: int = 0
    end: int = 0
    pieces: list[Piece] = field(default_factory=list)
    done: int = 0  # columns that finished calls have gone through
    any_open: bool = False  # whether a gate of any row is, once the prompt has been read

    def __post_init__(self) -> None:
        for index, gate in enumerate(self.gates):
            self.scores.setdefault(
                index, torch.full((len(self.last_prompt), len(gate.layers)), torch.nan)
            )

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

    def states_at_q(self, hidden: Tensor) -> Tensor:
        """States (B, d), float32, at the last prompt token, from all of the call's (B, T, d)."""
        places = [column - self.first for column in self.last_prompt]
        if len(set(places)) == 1:
            return hidden[:, places[0]].float()
        return hidden[torch.arange(len(places)), torch.tensor(places)].float()

    def repeat(self, times: int) -> None:
        """One row per beam or returned sequence, in the order generate expands them."""
        self.last_prompt = [column for column in self.last_prompt for _ in range(times)]
        self.padding = [count for count in self.padding for _ in range(times)]
        if self.text_columns is not None:
            self.text_columns = self.text_columns.repeat_interleave(times, 0)
        for table in (self.scores, self.opened, self.text_coordinates):
            for key in table:
                table[key] = table[key].repeat_interleave(times, 0)

    def latch(self, index: int, place: int | None, scores: Tensor) -> None:
        """Keep scores of a gate: of its layer number ``place``, (B,), or of all, (B, n)."""
        known = self.scores[index]
        if place is None:
            self.scores[index] = scores
            self.opened[index] = scores.sum(1, keepdim=True) > 0
        else:
            known[:, place] = scores
            self.opened[index] = known > 0  # layers still unread are NaN, so closed

    def open_rows(self, layer: int, source: str | None = None, at_prompt: bool = False) -> Tensor:
        """Rows (B,) open at a layer, by gates of one source or any.

        At the prompt's own columns a pooled gate of the request's own pass acts from its last
        layer on, because below that it is not decided yet; so it is in every later call.
        """
        rows = torch.zeros(self.rows, dtype=torch.bool)
        for index, opened in self.opened.items():
            gate = self.gates[index]
            if source not in (None, gate.source):
                continue
            if gate.per_layer:
                if layer in gate.layers:
                    rows = rows | opened[:, gate.layers.index(layer)]
            elif not (at_prompt and gate.source == "vlm" and layer < max(gate.layers)):
                rows = rows | opened[:, 0]
        return rows

    def fired(self, source: str | None = None) -> Tensor:
        """Rows (B,) that any gate of a source, or at all, opened at any layer."""
        rows = torch.zeros(self.rows, dtype=torch.bool)
        for index, opened in self.opened.items():
            if source in (None, self.gates[index].source):
                rows = rows | opened.any(1)
        return rows
