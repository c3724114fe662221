"""The conformal threshold against an exact binomial reference and against simulation."""

from __future__ import annotations

from fractions import Fraction
from math import comb

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vlm_safeguard.calibration.conformal import allowed_exceedances, conformal_threshold
from vlm_safeguard.errors import CalibrationError


def exact_cdf(k: int, n: int, p: Fraction) -> Fraction:
    return sum((comb(n, i) * p**i * (1 - p) ** (n - i) for i in range(k + 1)), Fraction(0))


@settings(deadline=None, max_examples=60)
@given(
    n=st.integers(1, 160),
    percent=st.integers(1, 30),
    confidence=st.sampled_from([80, 90, 95, 99]),
)
def test_exceedances_are_the_most_that_the_binomial_allows(
    n: int, percent: int, confidence: int
) -> None:
    p, tail = Fraction(percent, 100), 1 - Fraction(confidence, 100)
    k = allowed_exceedances(n, percent / 100, confidence / 100)
    if k >= 0:
        assert exact_cdf(k, n, p) <= tail
    if k + 1 < n:
        assert exact_cdf(k + 1, n, p) > tail


def test_the_guarantee_holds_in_simulation() -> None:
    generator = torch.Generator().manual_seed(0)
    epsilon, trials, broken = 0.05, 2000, 0
    for _ in range(trials):
        # Uniform scores: the false-positive rate above a threshold t is exactly 1 - t.
        cut = conformal_threshold(torch.rand(120, generator=generator), epsilon)
        broken += 1 - cut > epsilon
    # 5 % of calibrations may break it; three standard errors of the simulation are 1.5 %.
    assert broken / trials <= 0.065
    assert broken > 0  # and it is not needlessly strict


def test_exactly_the_allowed_number_of_scores_lies_above() -> None:
    scores = torch.arange(400.0)[torch.randperm(400, generator=torch.Generator().manual_seed(1))]
    cut = conformal_threshold(scores, 0.02)
    assert int((scores > cut).sum()) == allowed_exceedances(400, 0.02) > 0


def test_too_few_prompts_are_refused_with_the_number_needed() -> None:
    conformal_threshold(torch.rand(149), 0.02)
    with pytest.raises(CalibrationError, match="needs 149 harmless prompts"):
        conformal_threshold(torch.rand(148), 0.02)


@pytest.mark.parametrize(("epsilon", "confidence"), [(0.0, 0.9), (1.0, 0.9), (0.1, 1.0)])
def test_levels_outside_the_unit_interval_are_refused(epsilon: float, confidence: float) -> None:
    with pytest.raises(ValueError, match="strictly between"):
        allowed_exceedances(100, epsilon, confidence)
