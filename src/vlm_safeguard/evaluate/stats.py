"""Intervals on rates, and a paired test."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Rate:
    """A rate with its 95% Wilson interval. ``low`` and ``high`` lie in [0, 1]."""

    count: int
    n: int
    low: float
    high: float

    @property
    def value(self) -> float:
        return self.count / self.n if self.n else math.nan

    def __str__(self) -> str:
        return f"{self.value:.1%} [{self.low:.1%}, {self.high:.1%}] ({self.count}/{self.n})"


def wilson(count: int, n: int, z: float = 1.959964) -> Rate:
    """Wilson score interval of ``count`` successes in ``n`` trials.

    Raises:
        ValueError: count is not within 0..n.
    """
    if not 0 <= count <= n:
        raise ValueError(f"count must be within 0..{n}, got {count}")
    if n == 0:
        return Rate(0, 0, 0.0, 1.0)
    p, z2 = count / n, z * z
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = z / (1 + z2 / n) * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    return Rate(count, n, max(0.0, centre - half), min(1.0, centre + half))


def mcnemar(before: Sequence[bool], after: Sequence[bool]) -> float:
    """Exact two-sided McNemar test of paired outcomes: the p-value."""
    gained = sum(b and not a for b, a in zip(before, after, strict=True))
    lost = sum(a and not b for b, a in zip(before, after, strict=True))
    n, k = gained + lost, min(gained, lost)
    tail = sum(math.comb(n, i) for i in range(k + 1)) / 2**n if n else 1.0
    return min(1.0, 2 * tail)
