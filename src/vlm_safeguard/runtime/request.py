"""The state of one request: the decision for each row of the batch.

A request is a ``generate`` call, or starts with a forward call without a cache. Its state is new at
each start and dropped at the end, so nothing leaks into the next request. The state of one forward
call is in its ``ForwardPass``.

A row is known by its place in the batch. Code that moves rows between its own forward calls
(``cache.reorder_cache``) must not move them to another prompt, which cannot be detected here. Beam
search inside ``generate`` only moves rows among the beams of one prompt.

Decisions are kept in lists on the host, so a decoding step does not wait for the device.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from vlm_safeguard.artifact.config import Gate

_T = TypeVar("_T")


@dataclass(frozen=True)
class Span:
    """Columns that steering may change in one forward call.

    ``columns`` are relative to the call. If prompts end at different columns (padding on the
    right), they are one column per row. ``step``: 0 at the prompt; behind it the number of answer
    tokens so far, or 1 throughout if all of them get the same dose. ``new``: how many of the
    columns, per row, no earlier call of the request has computed.
    """

    columns: slice | list[int]
    step: int
    new: int


@dataclass(frozen=True)
class Dose:
    """The change that a layer applies to its open rows.

    ``rows``: their places in the batch; ``index`` (b,): the same as a tensor, None for all rows.
    Their coordinates along ``directions`` (m, d) become ``target`` (b, m). Without directions,
    ``target`` (b, d) is added to the states.
    """

    rows: list[int]
    index: Tensor | None
    directions: Tensor | None
    target: Tensor


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
    """The state of a request of B rows whose padded prompt has ``prompt_width`` columns.

    Columns are counted in the padded sequence, not in a forward call.
    """

    gates: list[Gate]
    prompt_width: int
    last_prompt: list[int]  # column of q in each row
    padding: list[int]  # prompt columns in each row that hold no token
    wordless: frozenset[int] = frozenset()  # rows whose text says nothing: no text gate is read
    # Rows whose text has no verdict, see ``gate.refusal_signs``.
    verdictless: frozenset[int] = frozenset()
    # By gate, then row: what each layer, and last what logits add, NaN if not read yet; whether it
    # is open, per layer too unless the gate is pooled.
    scores: dict[int, list[list[float]]] = field(default_factory=dict)
    opened: dict[int, list[list[bool]]] = field(default_factory=dict)
    # Rows whose text the LLM would refuse, by the verdict of a gate that has one.
    refused: list[bool] = field(init=False)
    text_coordinates: dict[int, Tensor] = field(default_factory=dict)  # by layer, (B, m)
    pass_coordinates: dict[int, Tensor] = field(default_factory=dict)
    # By step (see ``Span``), then layer; None where no row is open.
    doses: dict[int, dict[int, Dose | None]] = field(default_factory=lambda: defaultdict(dict))
    text_calls: Calls = field(default_factory=Calls)
    calls: Calls = field(default_factory=Calls)
    cache: Any = None
    done: int = 0  # columns that finished calls have gone through
    # Those of them that may be steered: of the prompt, and behind it.
    prompt_columns: int = 0
    later_columns: int = 0
    copies: int = 1  # rows of each prompt: beams, or sequences to return
    returned: int | None = None  # sequences that ``generate`` returned; None: all rows count
    any_open: bool = False  # whether a gate of any row is, of those decided by now

    def __post_init__(self) -> None:
        for index, gate in enumerate(self.gates):
            self.scores[index] = [[math.nan] * len(gate.layers) for _ in self.last_prompt]
        self.refused = [False] * self.rows

    @property
    def rows(self) -> int:
        return len(self.last_prompt)

    @property
    def judged(self) -> list[bool]:
        """Which rows' text has a verdict."""
        return [row not in self.verdictless for row in range(self.rows)]

    @property
    def decided(self) -> bool:
        return self.done >= self.prompt_width

    @property
    def reported(self) -> list[int]:
        """The rows to report on: one per returned sequence. Beams of a prompt share a decision."""
        prompts = self.rows // self.copies
        each = self.copies if self.returned is None else self.returned // prompts
        return [row for row in range(self.rows) if row % self.copies < each]

    def end(self, returned: int) -> None:
        """``generate`` is over and returned so many sequences. The cache is let go."""
        self.returned, self.cache = returned, None

    def leave(self, spans: Iterable[Span], end: int) -> None:
        """A forward call ran to its end, column ``end``; ``spans`` of it may be steered."""
        for span in spans:
            if span.step == 0:
                self.prompt_columns += span.new
            else:
                self.later_columns += span.new
        self.done = end

    def repeat(self, times: int) -> None:
        """One row per beam or returned sequence, in the order generate expands them."""
        self.copies *= times
        self.last_prompt, self.padding = _each(self.last_prompt, times), _each(self.padding, times)
        self.refused = _each(self.refused, times)
        for index, scores in self.scores.items():  # rows of their own: each is latched by itself
            self.scores[index] = [list(values) for values in _each(scores, times)]
        for index, opened in self.opened.items():
            self.opened[index] = [list(values) for values in _each(opened, times)]
        for layer, found in self.text_coordinates.items():
            self.text_coordinates[layer] = found.repeat_interleave(times, 0)

    def latch(self, index: int, place: int | None, scores: list[list[float]]) -> None:
        """Keep a gate's scores and decisions for each row: of its layer number ``place``, or if
        None of all its layers, whose sum decides. Text gates stay shut for rows without words."""
        if self.gates[index].source == "text":
            scores = [
                [math.nan] * len(values) if row in self.wordless else values
                for row, values in enumerate(scores)
            ]
        if place is None:
            self.scores[index] = scores
            opened = [[sum(values) > 0] for values in scores]
            self.opened[index] = opened
        else:
            known = self.scores[index]
            opened = self.opened.setdefault(index, [[False] * len(row) for row in known])
            for row, [score] in enumerate(scores):
                known[row][place] = score
                opened[row][place] = score > 0
        self.any_open = self.any_open or any(any(row) for row in opened)

    def part(self, rows: Sequence[int], judged: bool) -> Request:
        """A request of some of the rows, to read another form of their text.

        ``judged``: whether that has a verdict.
        """
        return Request(
            self.gates,
            self.prompt_width,
            [self.last_prompt[row] for row in rows],
            [self.padding[row] for row in rows],
            verdictless=frozenset() if judged else frozenset(range(len(rows))),
        )

    def take_worse(self, rows: Sequence[int], other: Request) -> None:
        """Take what text gates read in other readings of the text of ``rows``, where they score it
        higher, and the coordinates and verdict of the first that opens them, where the text does
        not. A text without a verdict takes that of the first reading that has one.

        A row may have several readings.
        """
        known, theirs, judged = self.fired("text"), other.fired("text"), other.judged
        for n, row in reversed(list(enumerate(rows))):  # the first reading last: it stays
            if (theirs[n] and not known[row]) or (row in self.verdictless and judged[n]):
                self.refused[row] = other.refused[n]
            if judged[n]:
                self.verdictless -= {row}
        for layer, found in other.text_coordinates.items():
            known, theirs = self.open_at(layer, "text"), other.open_at(layer, "text")
            newly = {row: n for n, row in reversed(list(enumerate(rows))) if theirs[n]}
            newly = {row: n for row, n in newly.items() if not known[row]}
            if newly:
                old = self.text_coordinates.get(layer, found.new_zeros(self.rows, found.shape[1]))
                places = torch.tensor(list(newly), device=old.device)
                taken = found[list(newly.values())].to(old)
                self.text_coordinates[layer] = old.index_copy(0, places, taken)
        for index, gate in enumerate(self.gates):
            for n, row in enumerate(rows) if gate.source == "text" else ():
                known_scores, new_scores = self.scores[index][row], other.scores[index][n]
                if gate.per_layer:
                    worse = list(map(max, known_scores, new_scores))
                    opened = [score > 0 for score in worse]
                else:
                    worse = max(known_scores, new_scores, key=sum)
                    opened = [sum(worse) > 0]
                self.scores[index][row], self.opened[index][row] = worse, opened
        self.any_open = self.any_open or other.any_open
        self.text_calls.count(other.text_calls.made, other.text_calls.expected)

    def open_at(self, layer: int, source: str | None = None, at_prompt: bool = False) -> list[bool]:
        """Which rows are open at a layer, by any gate or by those of one source.

        ``at_prompt``: at the prompt's columns, a ``vlm`` gate without ``per_layer`` acts only from
        its last layer on, because it is not decided below. In later calls it acts at every layer.
        """
        rows = [False] * self.rows
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
            rows = [known or own[place] for known, own in zip(rows, opened, strict=True)]
        return rows

    def fired(self, source: str | None = None) -> list[bool]:
        """Which rows are open at any layer, by any gate or by those of one source."""
        rows = [False] * self.rows
        for index, opened in self.opened.items():
            if source in (None, self.gates[index].source):
                rows = [known or any(own) for known, own in zip(rows, opened, strict=True)]
        return rows


def _each(values: list[_T], times: int) -> list[_T]:
    return [value for value in values for _ in range(times)]
