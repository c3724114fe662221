"""One forward pass of vLLM's flattened batch: gates are read and doses applied, row by row.

The tokens of all requests stand one after the other in one column (T, d). A decoder layer of vLLM
returns that as two tensors, whose sum is the residual stream.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vlm_safeguard import method
from vlm_safeguard.engines.vllm.watched import Watched
from vlm_safeguard.engines.vllm.word_sums import WordReading
from vlm_safeguard.errors import GuardRuntimeError
from vlm_safeguard.runtime.gate import GateReading, Gates
from vlm_safeguard.runtime.request import Dose
from vlm_safeguard.runtime.steering import Steerer


@dataclass(frozen=True)
class BatchRow:
    """A request's part of the batch.

    Attributes:
        number: its place among the requests of the batch.
        start: its first token in the flattened batch.
        columns: the columns of its own sequence that this pass computes.
    """

    watched: Watched
    number: int
    start: int
    columns: range

    @property
    def ends_prompt(self) -> bool:
        """Whether its gates are read in this pass, at its last prompt token."""
        watched = self.watched
        return not watched.decided and watched.width <= self.columns.stop

    @property
    def last(self) -> int:
        """The place of its last prompt token in the flattened batch."""
        return self.start + self.watched.width - 1 - self.columns.start


@dataclass(frozen=True)
class _Reading:
    row: BatchRow
    gates: GateReading


@dataclass(frozen=True)
class _Place:
    """Tokens of one request that may be steered: ``first`` and ``count`` in the flattened batch;
    ``step`` as in ``Span``."""

    row: BatchRow
    first: int
    count: int
    step: int


class Step:
    """A pass over rows of requests.

    Args:
        rows: all rows of the batch, in order.
        layers: the guarded layers, in order.
        gates, steerer: the guard's.
        probe: so many tokens stand behind each text (``TextFrame``).
    """

    def __init__(
        self,
        rows: Sequence[BatchRow],
        layers: Sequence[int],
        gates: Gates,
        steerer: Steerer,
        probe: int = 0,
    ) -> None:
        self.rows, self._layers, self._steerer, self._probe = rows, layers, steerer, probe
        self._seen: list[int] = []
        self._broken: set[int] = set()  # numbers of rows
        self._texts: list[_Reading] = []
        self._words = WordReading()
        self._said: list[tuple[Watched, int]] = []  # texts, and the place of their last token
        self._prompts: list[_Reading] = []
        self._places: list[_Place] = []
        self.read = False  # whether ``read_logits`` was called
        for row in rows:
            if not row.watched.decided and row.columns.start >= row.watched.width:
                row.watched.fail("its last prompt token was not computed under guard")
            if row.watched.failed:
                continue
            if row.watched.is_text:
                self._add_text(row, gates)
                continue
            if row.ends_prompt:
                self._prompts.append(_Reading(row, GateReading(gates, "vlm")))
            if row.ends_prompt or row.watched.request.any_open:
                self._places += self._steerable(row)
        self._text_layers = gates.layers("text") | steerer.reads_text
        self._mean_layers = gates.layers("text", with_mean=True)
        self._prompt_layers = gates.layers("vlm") | steerer.reads_pass

    @property
    def idle(self) -> bool:
        """Whether nothing is read or steered."""
        return not (self._texts or self._words or self._prompts or self._places)

    def visit(self, layer: int, hidden: Tensor, residual: Tensor | None) -> None:
        """Called after each guarded layer with its output (``parts_of``), which is changed in
        place."""
        self._seen.append(layer)
        if self.idle:
            return
        stream = _ResidualStream(hidden, residual)
        if layer in self._text_layers:
            self._read_texts(layer, stream)
        if layer in self._prompt_layers and self._prompts:
            states = stream.at([reading.row.last for reading in self._prompts]).float()
            self._read(self._prompts, layer, states, states)
        if self._places and layer in self._steerer.layers:
            self._steer(layer, stream)

    def read_states(self, states: Tensor, head: Callable[[Tensor], Tensor | None]) -> None:
        """Take the logits at the last token of texts with a probe behind it, of which vLLM asks no
        logits.

        Args:
            states: what the model puts out for all tokens of the batch, (T, d).
            head: makes logits (b, vocabulary) of some of them; none on some ranks.
        """
        if not self._said:
            return
        places = torch.tensor([place for _, place in self._said], device=states.device)
        logits = head(states.index_select(0, places))
        for number, (watched, _) in enumerate(self._said):
            # Copied: a view would keep those of all texts in memory.
            watched.logits = None if logits is None else logits[number : number + 1].clone()

    def read_logits(self, states: Tensor, logits: Tensor | None) -> None:
        """Take the logits (requests, vocabulary) at each row's last token of this pass, and the
        states (requests, d) they are computed from.

        A request fails if its state is NaN or Inf, or if its logits are where its prompt ends or
        it is steered. Elsewhere logits are not read: for 64 requests that takes 1% of a step.

        Raises:
            GuardRuntimeError: these are not the rows of the batch.
        """
        for what, found in (("states", states), ("rows of logits", logits)):
            if found is not None and len(found) != len(self.rows):
                raise GuardRuntimeError(
                    f"{len(found)} {what} at the head for {len(self.rows)} rows of the batch"
                )
        self.read = True
        self._check_finite(states, logits)
        for reading in self._texts:
            watched, number = reading.row.watched, reading.row.number
            if not reading.gates.reads_logits or watched.failed:
                continue
            found = None if logits is None else logits[number : number + 1]
            if self._probe:
                found, watched.logits = watched.logits, None
            if found is None:
                watched.fail("the logits of its text are not on this worker")
                continue
            with _Failing(watched):
                reading.gates.read_logits(watched.request, found)

    def _check_finite(self, states: Tensor, logits: Tensor | None) -> None:
        finite = states.isfinite().all(1)
        rows = [reading.row for reading in (*self._texts, *self._prompts)]
        rows += [place.row for place in self._places]
        numbers = sorted({row.number for row in rows})
        if logits is not None and numbers:
            first, stop = numbers[0], numbers[-1] + 1
            # The rows mostly follow one another. A slice reads them in place; an index copies them.
            in_a_row = stop - first == len(numbers)
            index = slice(first, stop) if in_a_row else torch.tensor(numbers, device=states.device)
            finite[index] &= logits[index].amax(1).isfinite()
        for row, is_finite in zip(self.rows, finite.tolist(), strict=True):
            if not is_finite:
                row.watched.fail("its last state or its logits are NaN or Inf")
                self._broken.add(row.number)

    def finish(self) -> list[Watched]:
        """End the pass.

        Returns:
            The requests whose prompt was read to its end, or whose logits are not finite.

        Raises:
            GuardRuntimeError: a guarded layer did not run: no token of this pass may be used.
        """
        if self._seen != list(self._layers):
            raise GuardRuntimeError(
                f"{len(self._seen)} of {len(self._layers)} guarded layers ran: the guard's hooks "
                "were removed or bypassed, or the model was compiled without them"
            )
        ended = []
        for row in self.rows:
            watched = row.watched
            if row.ends_prompt or row.number in self._broken:
                ended.append(watched)
            if row.ends_prompt:
                self._check_read(watched)
                watched.decided = True
        return ended

    def _add_text(self, row: BatchRow, gates: Gates) -> None:
        watched = row.watched
        if watched.words is not None and not watched.decided:
            with _Failing(watched):
                self._words.add(watched.words, row.start, row.columns, row.ends_prompt)
        if watched.failed or watched.decided:
            return
        reading = _Reading(row, GateReading(gates, "text", watched.role.judged))
        last = watched.width - 1 - self._probe
        if self._probe and reading.gates.reads_logits and last in row.columns:
            self._said.append((watched, row.start + last - row.columns.start))
        if row.ends_prompt:
            self._texts.append(reading)

    def _steerable(self, row: BatchRow) -> list[_Place]:
        found = []
        for span in self._steerer.spans(row.watched.request, row.columns):
            if isinstance(span.columns, slice):  # one row has no other
                first, stop = span.columns.start, span.columns.stop
                found.append(_Place(row, row.start + first, stop - first, span.step))
        return found

    def _read_texts(self, layer: int, stream: _ResidualStream) -> None:
        words = layer in self._mean_layers
        sums = None
        if self._words and (words or self._probe):
            sums = self._words.read(layer, stream.at, stream.device, words)  # (b, k, d)
        if not self._texts:
            return
        ends = stream.at([reading.row.last for reading in self._texts]).float()
        if sums is None:
            self._read(self._texts, layer, ends, ends)
        elif self._probe:
            seen = torch.cat([sums.flatten(1), ends], 1)
            self._read(self._texts, layer, sums[:, 0], seen)
        else:
            self._read(self._texts, layer, ends, torch.cat([ends, sums.flatten(1)], 1))

    def _read(self, readings: list[_Reading], layer: int, states: Tensor, seen: Tensor) -> None:
        """Take the states (b, d) at the last token of each prompt or text, and all that gates may
        see of it (``model.words.readings``), which begins with them."""
        for number, reading in enumerate(readings):
            watched, state = reading.row.watched, states[number : number + 1]
            if watched.failed:
                continue
            with _Failing(watched):
                reading.gates.read(watched.request, layer, seen[number : number + 1])
                if watched.is_text:
                    self._steerer.read_text(watched.request, layer, state)
                else:
                    self._steerer.read_pass(watched.request, layer, state)

    def _steer(self, layer: int, stream: _ResidualStream) -> None:
        places: list[int] = []
        doses: list[Dose] = []
        for place in self._places:
            watched = place.row.watched
            if watched.failed or not watched.request.any_open:
                continue
            dose = self._steerer.dose(watched.request, layer, place.step, stream.device)
            if dose is not None:
                places += range(place.first, place.first + place.count)
                doses += [dose] * place.count
        if not doses:
            return
        states, directions = stream.at(places), doses[0].directions
        targets = torch.cat([dose.target for dose in doses])
        steered = (
            method.shift(states, targets)
            if directions is None
            else method.set_coordinates(states, directions, targets)
        )
        stream.put(places, steered)
        self._measure(layer, places, states, steered)

    def _measure(self, layer: int, places: list[int], before: Tensor, after: Tensor) -> None:
        """How far the state at the last prompt token of a canary was moved."""
        for reading in self._prompts:
            watched = reading.row.watched
            if watched.role.canary and reading.row.last in places:
                number = places.index(reading.row.last)
                change = after[number].float() - before[number].float()
                watched.moved[str(layer)] = float(change.norm())

    def _check_read(self, watched: Watched) -> None:
        """Fail a request of which a gate was not read."""
        source = "text" if watched.is_text else None
        for index, gate in enumerate(watched.request.gates):
            read = len(watched.request.opened.get(index, ()))
            if source in (None, gate.source) and not read:
                watched.fail("a gate was not read")


def parts_of(output: Any) -> tuple[Tensor, Tensor | None]:
    """The one or two tensors (T, d) of a layer's output.

    Raises:
        GuardRuntimeError: it is something else.
    """
    parts = output if isinstance(output, tuple) else (output,)
    if len(parts) > 2 or not all(
        isinstance(part, Tensor) and part.ndim == 2 and part.shape == parts[0].shape
        for part in parts
    ):
        raise GuardRuntimeError(
            "a decoder layer returns neither a residual stream (tokens, hidden size) nor two "
            "tensors whose sum it is: this model is not supported in vLLM"
        )
    return parts[0], parts[1] if len(parts) == 2 else None


class _ResidualStream:
    """The residual stream (T, d) in a layer's output: a tensor, or two whose sum it is."""

    def __init__(self, hidden: Tensor, residual: Tensor | None) -> None:
        # Again: in a compiled model a layer's output is looked at only when it is traced.
        parts = hidden if residual is None else (hidden, residual)
        self._hidden, self._residual = parts_of(parts)

    @property
    def device(self) -> torch.device:
        return self._hidden.device

    def at(self, places: list[int] | Tensor) -> Tensor:
        """The states (b, d) of some tokens."""
        index = self._index(places)
        hidden = self._hidden.index_select(0, index)
        return hidden if self._residual is None else hidden + self._residual.index_select(0, index)

    def put(self, places: list[int], states: Tensor) -> None:
        """Put states (b, d) in the place of some tokens' own."""
        index = self._index(places)
        self._hidden.index_copy_(0, index, states.to(self._hidden.dtype))
        if self._residual is not None:
            self._residual.index_fill_(0, index, 0)

    def _index(self, places: list[int] | Tensor) -> Tensor:
        return torch.as_tensor(places, device=self._hidden.device)


class _Failing:
    """Fails one request where its guard cannot do its work; the others of the batch go on."""

    def __init__(self, watched: Watched) -> None:
        self._watched = watched

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> bool:
        if isinstance(error, GuardRuntimeError):
            self._watched.fail(str(error))
            return True
        return False
