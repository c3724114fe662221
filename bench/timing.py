"""The paired timer: what costs are compared with, and how they are summed up."""

from __future__ import annotations

import gc
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of some figures, and how many they are."""

    median: float
    low: float
    high: float
    count: int

    def __str__(self) -> str:
        return f"{self.median:#.3g} [{self.low:#.3g}, {self.high:#.3g}]"


def spread(values: Sequence[float]) -> Spread:
    """The spread of at least one figure."""
    if len(values) == 1:
        return Spread(values[0], values[0], values[0], 1)
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return Spread(middle, low, high, len(values))


def weighted_spread(values: Sequence[float], weights: Sequence[float]) -> Spread:
    """The spread of at least one figure, each of which counts as much as it weighs."""
    total, left = sum(weights), [0.25, 0.5, 0.75]
    passed, found = 0.0, list[float]()
    for value, weight in sorted(zip(values, weights, strict=True)):
        passed += weight
        while left and passed >= left[0] * total:
            found.append(value)
            left.pop(0)
    low, middle, high = found
    return Spread(middle, low, high, len(values))


def ratios(measured: Sequence[float], plain: Sequence[float]) -> Spread:
    """The spread of ratios, pair by pair."""
    return spread([one / other for one, other in zip(measured, plain, strict=True)])


def as_json(value: Any) -> Any:
    """Figures for JSON: five digits are more than any of them is good for."""
    if isinstance(value, Spread):
        return as_json(asdict(value))
    if isinstance(value, dict):
        return {str(key): as_json(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [as_json(part) for part in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


@contextmanager
def without_gc() -> Iterator[None]:
    """No garbage collection inside, but where it is asked for; what is there by now is left out of
    it, so that it is quick."""
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.unfreeze()


def seconds(work: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


Setup = Callable[[], AbstractContextManager[Any]]


def interleaved(
    setups: Mapping[str, Setup],
    work: Callable[[str], Any],
    rounds: int,
    seed: int = 0,
) -> dict[str, list[Any]]:
    """Every setup once a round, in random order, after one round that does not count.

    What a setup does to get on and off (attaching a guard) is outside of ``work``, which is timed.
    """
    order, shuffle = list(setups), random.Random(seed).shuffle
    results: dict[str, list[Any]] = {name: [] for name in order}
    with without_gc():
        for number in range(rounds + 1):
            gc.collect()
            shuffle(order)
            for name in order:
                with setups[name]():
                    result = work(name)
                if number:
                    results[name].append(result)
    return results
