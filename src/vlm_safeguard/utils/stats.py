"""Confidence intervals of rates and their differences, and paired tests."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Z = 1.959964  # of the normal distribution, for 95%


@dataclass(frozen=True)
class Rate:
    """A rate with its 95% Wilson interval, clustered or not.

    ``low`` and ``high`` lie in [0, 1]. A rate of no trials has the value NaN, in JSON null.
    """

    count: int
    n: int
    low: float
    high: float

    @property
    def value(self) -> float:
        return self.count / self.n if self.n else math.nan

    def __str__(self) -> str:
        return f"{self.interval} ({self.count}/{self.n})"

    @property
    def interval(self) -> str:
        """The rate and its interval, without the counts."""
        return with_interval(self.value, self.low, self.high)

    def as_dict(self, name: str = "value") -> dict[str, Any]:
        """For JSON. With a name: under ``name``, ``{name}_low`` and so on, beside other rates."""
        value, low, high = (self.value, self.low, self.high) if self.n else (None, None, None)
        mark = "" if name == "value" else f"{name}_"
        found = {name: value, f"{mark}low": low, f"{mark}high": high}
        return found | {f"{mark}count": self.count, f"{mark}n": self.n}

    @classmethod
    def of_share(cls, share: float, n: int) -> Rate:
        """The rate of ``n`` trials that comes nearest to ``share``, for records without counts.

        Raises:
            ValueError: ``share`` is not within 0..1.
        """
        return wilson(round(share * n), n)

    @classmethod
    def from_dict(cls, found: Mapping[str, Any], name: str = "value") -> Rate:
        """What ``as_dict`` wrote, also without the count.

        Raises:
            KeyError, TypeError, ValueError: it is something else.
        """
        mark = "" if name == "value" else f"{name}_"
        value, low, high = (found[key] for key in (name, f"{mark}low", f"{mark}high"))
        n = int(found[f"{mark}n"])
        if not n:
            return wilson(0, 0)
        return cls(round(float(value) * n), n, float(low), float(high))


def with_interval(value: float, low: float, high: float) -> str:
    """How a rate is written with its interval."""
    return f"{value:.1%} [{low:.1%}, {high:.1%}]"


def wilson(count: int, n: int) -> Rate:
    """Wilson score interval of ``count`` successes in ``n`` trials.

    Raises:
        ValueError: count is not within 0..n.
    """
    if not 0 <= count <= n:
        raise ValueError(f"count must be within 0..{n}, got {count}")
    if n == 0:
        return Rate(0, 0, 0.0, 1.0)
    return Rate(count, n, *_wilson_bounds(count / n, n))


def mcnemar(before: Sequence[bool], after: Sequence[bool]) -> float:
    """Exact two-sided McNemar test of independent paired outcomes: the p-value.

    For pairs that come in clusters see ``sign_flip``.
    """
    gained = sum(b and not a for b, a in zip(before, after, strict=True))
    lost = sum(a and not b for b, a in zip(before, after, strict=True))
    from scipy.stats import binomtest  # takes a second to import

    return float(binomtest(gained, gained + lost).pvalue) if gained + lost else 1.0


def sign_flip(before: Sequence[bool], after: Sequence[bool], clusters: Sequence[str]) -> float:
    """Exact two-sided paired test of trials that come in clusters: the p-value.

    A question that flips in all of its templates is one observation. If the systems do not differ,
    either could have given a cluster's outcomes: each cluster's sum of paired differences is as
    likely with the other sign (Fisher 1935, Pitman 1937). The p-value is the share of all 2^k
    choices of signs whose total is as far from 0 as the one found. It is counted by convolution
    over the totals, so it is exact for any number of clusters. With a cluster for each pair it is
    ``mcnemar``.
    """
    sums: dict[str, int] = {}
    for b, a, cluster in zip(before, after, clusters, strict=True):
        sums[cluster] = sums.get(cluster, 0) + int(b) - int(a)
    sizes = [abs(one) for one in sums.values() if one]
    farthest = sum(sizes)
    chances = np.zeros(2 * farthest + 1)  # of each total, from -farthest on
    chances[farthest] = 1.0
    for size in sizes:
        # No total leaves the range before the last cluster, so nothing is rolled over its ends.
        chances = (np.roll(chances, size) + np.roll(chances, -size)) / 2
    totals = np.abs(np.arange(-farthest, farthest + 1))
    return min(1.0, float(chances[totals >= abs(sum(sums.values()))].sum()))


def clustered_wilson(hits: Sequence[bool], clusters: Sequence[str]) -> Rate:
    """Wilson interval of a rate whose trials come in clusters (a question in many templates).

    The number of trials is replaced by the effective one, p (1 - p) over the clustered variance of
    the mean, never more than there are (Korn and Graubard 1998). Where all trials are alike, that
    is unknown, and whole clusters are taken to be alike: n^2 over the sum of squared sizes.

    That alone can rank rates wrongly: no success in 20 clusters of 5 would reach up to 16%, a
    single one only to 5%. So the upper end is the largest that these successes or any fewer of them
    would give, and the lower end, likewise, that of these failures or any fewer. A success more
    then never lowers either end, and the interval is never narrower than without this. With a
    cluster for each trial it is ``wilson``.
    """
    rate = wilson(sum(hits), len(hits))
    groups: dict[str, list[bool]] = {}
    for hit, cluster in zip(hits, clusters, strict=True):
        groups.setdefault(cluster, []).append(hit)
    if len(groups) == rate.n:
        return rate
    sizes = np.array([len(group) for group in groups.values()])
    found = np.array([sum(group) for group in groups.values()])
    low, high = 1 - _upper_end(sizes - found, sizes), _upper_end(found, sizes)
    return Rate(rate.count, rate.n, low, high)


def effective_trials(hits: Sequence[bool], clusters: Sequence[str]) -> float:
    """How many independent trials clustered ones are worth.

    As many as give a Wilson interval that reaches as far as ``clustered_wilson``'s, on the side
    where it is wider: the Wilson ends t of a rate p are where (t - p)^2 = z^2 t (1 - t) / n.
    """
    rate = clustered_wilson(hits, clusters)
    ends = [end for end in (rate.low, rate.high) if 0 < end < 1]
    worth = [Z * Z * end * (1 - end) / (end - rate.value) ** 2 for end in ends]
    return min([float(rate.n), *worth])


def _upper_end(found: np.ndarray, sizes: np.ndarray) -> float:
    """The largest upper end that ``found`` successes by cluster, or fewer of them, would give.

    For each total t up to theirs, the clustered variance is bounded over all ways to keep t of
    them. A cluster that keeps y of its k successes in m trials adds y^2 - 2 p m y + (p m)^2; the
    first two terms are convex in y and at most (k - 2 p m) y. So the bound fills the clusters of
    the steepest slope first. For t = all of them it is the variance itself, and it can only grow
    with more successes in any cluster: hence the upper end does, too.
    """
    n, count = int(sizes.sum()), len(sizes)
    alike = n * n / (sizes**2).sum()  # effective trials if each cluster is of one kind
    kinds, times = np.unique(np.stack([found, sizes]), axis=1, return_counts=True)
    (k, m), total = kinds, np.arange(found.sum() + 1)
    p = total / n
    slopes = k - 2 * p[:, None] * m
    order = np.argsort(-slopes, axis=1)
    room = (k * times)[order]
    kept = np.clip(total[:, None] - (room.cumsum(1) - room), 0, room)
    squares = (kept * np.take_along_axis(slopes, order, 1)).sum(1) + p**2 * (sizes**2).sum()
    ends = []
    for rate, square in zip(p, squares, strict=True):
        effective = float(n)
        if count < 2 or rate in (0.0, 1.0):
            effective = alike
        elif square > 1e-9:  # else every cluster has the same rate, and the trials count in full
            variance = square * count / (count - 1) / n**2
            effective = min(effective, rate * (1 - rate) / variance)
        ends.append(_wilson_bounds(float(rate), effective)[1])
    return max(ends)


def _wilson_bounds(p: float, n: float) -> tuple[float, float]:
    """The Wilson interval of a rate p of n trials; n need be no whole number (scipy's must)."""
    z2 = Z * Z
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = Z / (1 + z2 / n) * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
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


def difference_interval(first: Rate, second: Rate) -> tuple[float, float]:
    """95% interval of second - first.

    Newcombe's hybrid score interval (1998, method 10) of two independent rates. For rates on the
    same prompts it is too wide, never too narrow, as long as they go together.
    """
    p, q = first.value, second.value
    return (
        q - p - math.hypot(q - second.low, first.high - p),
        q - p + math.hypot(second.high - q, p - first.low),
    )
