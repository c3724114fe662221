"""Intervals on rates and their differences, and a paired test."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


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
    return Rate(count, n, *_wilson_bounds(count / n, n, z))


def mcnemar(before: Sequence[bool], after: Sequence[bool]) -> float:
    """Exact two-sided McNemar test of paired outcomes: the p-value."""
    gained = sum(b and not a for b, a in zip(before, after, strict=True))
    lost = sum(a and not b for b, a in zip(before, after, strict=True))
    n, k = gained + lost, min(gained, lost)
    tail = sum(math.comb(n, i) for i in range(k + 1)) / 2**n if n else 1.0
    return min(1.0, 2 * tail)


def clustered_wilson(hits: Sequence[bool], clusters: Sequence[str], z: float = 1.959964) -> Rate:
    """Wilson interval of a rate whose trials come in clusters (a question in many templates).

    The number of trials is replaced by the effective one (``effective_trials``).
    """
    rate = wilson(sum(hits), len(hits), z)
    effective = effective_trials(hits, clusters)
    if effective == rate.n:
        return rate
    low, high = _wilson_bounds(rate.value, effective, z)
    return Rate(rate.count, rate.n, low, high)


def effective_trials(hits: Sequence[bool], clusters: Sequence[str]) -> float:
    """How many independent trials clustered ones are worth.

    p (1 - p) over the clustered variance of the mean (Korn and Graubard 1998), never more than
    there are. Where nothing varies (all trials alike) that is unknown, and the number of clusters
    is taken: the cautious choice.
    """
    n = len(hits)
    groups: dict[str, list[bool]] = {}
    for hit, cluster in zip(hits, clusters, strict=True):
        groups.setdefault(cluster, []).append(hit)
    count = len(groups)
    if count == n:
        return float(n)
    p = sum(hits) / n
    if count < 2 or p in (0.0, 1.0):
        return float(count)
    sums = sum((sum(group) - p * len(group)) ** 2 for group in groups.values())
    variance = sums * count / (count - 1) / n**2
    return min(float(n), p * (1 - p) / variance) if variance > 0 else float(n)


def _wilson_bounds(p: float, n: float, z: float) -> tuple[float, float]:
    z2 = z * z
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = z / (1 + z2 / n) * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def paired_bootstrap(
    before: Sequence[bool],
    after: Sequence[bool],
    clusters: Sequence[str],
    rounds: int = 2000,
    seed: int = 0,
) -> tuple[float, float]:
    """95% percentile interval of mean(before) - mean(after), pairs drawn anew by cluster."""
    sums: dict[str, list[int]] = {}
    for b, a, cluster in zip(before, after, clusters, strict=True):
        entry = sums.setdefault(cluster, [0, 0])
        entry[0] += int(b) - int(a)
        entry[1] += 1
    pairs = np.array(list(sums.values()), dtype=float)
    drawn = np.random.default_rng(seed).integers(len(pairs), size=(rounds, len(pairs)))
    totals = pairs[drawn].sum(1)
    low, high = np.percentile(totals[:, 0] / totals[:, 1], [2.5, 97.5])
    return float(low), float(high)


def difference_interval(
    first: tuple[float, float, float], second: tuple[float, float, float]
) -> tuple[float, float]:
    """95% interval of second - first, each a rate with its Wilson interval (value, low, high).

    Newcombe's hybrid score interval (1998, method 10) of two independent rates. For rates on the
    same prompts it is too wide, never too narrow, as long as they go together.
    """
    (p, p_low, p_high), (q, q_low, q_high) = first, second
    return (
        q - p - math.hypot(q - q_low, p_high - p),
        q - p + math.hypot(q_high - q, p - p_low),
    )
