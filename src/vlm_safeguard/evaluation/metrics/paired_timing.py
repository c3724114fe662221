"""Times two ``generate`` calls in lockstep, token by token, to compare their cost.

A machine's own speed wanders by several percent from one second to the next, more than a guard
costs. So each token of one stands right beside the same token of the other, and is divided by it.
"""

from __future__ import annotations

import copy
import itertools
import math
import statistics
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Paired:
    """Seconds of one call, and another's over them: to the first token, where each went first once
    (the geometric mean of the ratios), and per token after it, the median of the steps (NaN with
    none), so that one in which the machine did something else does not count."""

    first_s: float
    per_token_s: float
    first: float
    per_token: float


class _GivenUp(Exception):
    """Ends a ``generate`` call that nobody steps any more."""


class Stepped:
    """A ``generate`` call in a thread of its own that works only during ``step``.

    ``generate`` is called with its streamer, which is this object: ``put`` gets the prompt, then
    every token.
    """

    def __init__(self, generate: Callable[[Stepped], Any]) -> None:
        self._turn, self._done = threading.Semaphore(0), threading.Semaphore(0)
        self._begun = self._took = 0.0
        self._prompt = True  # what `put` gets next
        self._given_up = False
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(generate,), daemon=True)
        self._thread.start()

    def step(self) -> float:
        """Seconds that the next token takes; the first one's include all that comes before it.

        Raises:
            Exception: what ``generate`` raised.
        """
        self._turn.release()
        self._done.acquire()
        if self._error is not None:
            raise self._error
        return self._took

    def close(self) -> None:
        """Give the call up, wherever it is, and return when its thread has ended."""
        self._given_up = True
        self._turn.release()
        self._thread.join()

    def put(self, _: Tensor) -> None:
        if self._prompt:
            self._prompt = False
            return
        self._took = time.perf_counter() - self._begun
        self._done.release()
        self._wait()

    def end(self) -> None: ...

    def _wait(self) -> None:
        self._turn.acquire()
        if self._given_up:
            raise _GivenUp
        self._begun = time.perf_counter()

    def _run(self, generate: Callable[[Stepped], Any]) -> None:
        try:
            self._wait()
            generate(self)
            raise RuntimeError("generate has ended: it has no more tokens")
        except _GivenUp:
            pass
        except BaseException as error:
            self._error = error
            self._done.release()


def side_by_side(
    plain: Callable[[Stepped], Any], other: Callable[[Stepped], Any], tokens: int
) -> Paired:
    """The times of two ``generate`` calls, each given its streamer, for their first ``tokens``
    tokens. Which of them goes first changes from token to token; to the first token they are
    called once more for that, because the second finds the memory that the first has used.

    Hooks on one's model must not be on the other's: see ``twin``.

    Raises:
        Exception: what one of them raised.
    """
    [swapped] = _in_turn(plain, other, 1, ((1, 0),))
    first, *steps = _in_turn(plain, other, tokens, ((0, 1), (1, 0)))
    firsts = first, swapped
    return Paired(
        statistics.mean(one for one, _ in firsts),
        statistics.median(one for one, _ in steps) if steps else math.nan,
        statistics.geometric_mean(two / one for one, two in firsts),
        statistics.median(two / one for one, two in steps) if steps else math.nan,
    )


def _in_turn(
    plain: Callable[[Stepped], Any],
    other: Callable[[Stepped], Any],
    tokens: int,
    orders: Sequence[tuple[int, int]],
) -> list[tuple[float, float]]:
    """Seconds that each token took both calls; ``orders``: which goes first, by turns."""
    calls = Stepped(plain), Stepped(other)
    times: list[tuple[float, float]] = []
    try:
        for order in itertools.islice(itertools.cycle(orders), tokens):
            took = {which: calls[which].step() for which in order}
            times.append((took[0], took[1]))
    finally:
        for call in calls:
            call.close()
    return times


def write(
    model: Any, inputs: Mapping[str, Any], tokens: int, streamer: Stepped | None = None
) -> None:
    """Have ``model`` decode exactly ``tokens`` tokens, greedily."""
    model.generate(
        **inputs, do_sample=False, min_new_tokens=tokens, max_new_tokens=tokens, streamer=streamer
    )


def twin(model: Any) -> Any:
    """A copy of ``model`` with modules and hooks of its own around the same weights.

    Copied weights would lie elsewhere in memory, and the same product with them takes up to a
    quarter more or less time for that alone.
    """
    shared = itertools.chain(model.parameters(), model.buffers())
    return copy.deepcopy(model, {id(tensor): tensor for tensor in shared})
