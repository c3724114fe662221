"""Rates corrected for the errors of a judge."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlm_safeguard.evaluation.judges import (
    corrected_rate,
)
from vlm_safeguard.utils.stats import Rate, wilson


@given(st.integers(0, 50), st.integers(26, 50), st.integers(26, 50))
def test_the_corrected_rate_is_rogan_and_gladens(count: int, hits: int, rejections: int) -> None:
    se, sp = wilson(hits, 50), wilson(rejections, 50)
    found = corrected_rate(count, 50, se, sp, draws=400)
    expected = (count / 50 + sp.value - 1) / (se.value + sp.value - 1)
    assert found.value == pytest.approx(min(1.0, max(0.0, expected)))
    assert found.value is not None
    assert 0 <= found.low <= found.value <= found.high <= 1
    assert found == corrected_rate(count, 50, se, sp, draws=400)


def test_a_known_judge_leaves_the_rate_and_nearly_its_interval() -> None:
    perfect = wilson(10**6, 10**6)
    found = corrected_rate(30, 100, perfect, perfect)
    assert found.value == pytest.approx(0.3)
    plain = wilson(30, 100)
    assert (found.low, found.high) == pytest.approx((plain.low, plain.high), abs=0.01)


def test_the_interval_agrees_with_the_delta_method_in_large_samples() -> None:
    x, n, se, sp = 800, 2000, wilson(1800, 2000), wilson(1700, 2000)
    found = corrected_rate(x, n, se, sp)
    j = se.value + sp.value - 1
    theta = (x / n + sp.value - 1) / j

    def variance(rate: float, size: int) -> float:
        return rate * (1 - rate) / size

    # Rogan and Gladen 1978, the variance of the estimator.
    spread = (
        math.sqrt(
            variance(x / n, n)
            + theta**2 * variance(se.value, se.n)
            + (1 - theta) ** 2 * variance(sp.value, sp.n)
        )
        / j
    )
    assert (found.low, found.high) == pytest.approx(
        (theta - 1.96 * spread, theta + 1.96 * spread), abs=0.003
    )


@pytest.mark.parametrize(
    ("true", "se", "sp"), [(0.5, 0.6, 0.9), (0.04, 0.9, 0.85), (0.8, 0.6, 0.7)]
)
def test_the_interval_covers_the_truth(true: float, se: float, sp: float) -> None:
    generator = np.random.default_rng(1)
    covered, naive, runs = 0, 0, 300
    for run in range(runs):
        x = generator.binomial(150, true * se + (1 - true) * (1 - sp))
        hits, rejections = generator.binomial(120, se), generator.binomial(120, sp)
        found = corrected_rate(
            int(x), 150, wilson(int(hits), 120), wilson(int(rejections), 120), draws=1000, seed=run
        )
        covered += found.low <= true <= found.high
        plain = wilson(int(x), 150)
        naive += plain.low <= true <= plain.high
    assert covered / runs >= 0.92
    assert naive / runs < 0.8  # what goes wrong without the correction


@pytest.mark.parametrize(
    ("se", "sp", "reason"),
    [
        (wilson(33, 100), wilson(67, 100), "no better than chance"),
        (wilson(10, 100), wilson(50, 100), "no better than chance"),
        (wilson(0, 0), wilson(9, 10), "no scored attack success"),
        (wilson(9, 10), wilson(0, 0), "no scored other response"),
    ],
)
def test_a_judge_of_no_use_corrects_nothing(se: Rate, sp: Rate, reason: str) -> None:
    found = corrected_rate(20, 100, se, sp)
    assert found.value is None and (found.low, found.high) == (0.0, 1.0)
    assert reason in found.reason


def test_a_weak_judge_leaves_a_wide_interval() -> None:
    weak = corrected_rate(50, 100, wilson(6, 10), wilson(6, 10))
    assert weak.high - weak.low > 0.9
    # One draw in five or so is of a judge that knows nothing: it does not vouch for a rate of 0.
    assert corrected_rate(0, 100, wilson(6, 10), wilson(6, 10)).high > 0.5
    assert corrected_rate(0, 0, wilson(9, 10), wilson(9, 10)).value is None
    with pytest.raises(ValueError, match="within"):
        corrected_rate(5, 4, wilson(9, 10), wilson(9, 10))
