"""Intervals and paired tests, against references by formula and by brute force."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from vlm_safeguard.utils.stats import (
    Rate,
    _wilson_bounds,
    clustered_wilson,
    effective_trials,
    mcnemar,
    paired_bootstrap,
    sign_flip,
    wilson,
)

TWENTY = [str(n // 5) for n in range(100)]  # 20 questions in 5 templates


@st.composite
def clustered(draw: st.DrawFn, most: int = 8, largest: int = 5) -> tuple[list[bool], list[str]]:
    """Outcomes, and the cluster of each."""
    sizes = draw(st.lists(st.integers(1, largest), min_size=1, max_size=most))
    clusters = [str(place) for place, size in enumerate(sizes) for _ in range(size)]
    hits = draw(st.lists(st.booleans(), min_size=len(clusters), max_size=len(clusters)))
    return hits, clusters


@given(hits=st.lists(st.booleans(), min_size=1, max_size=60))
def test_with_a_cluster_each_it_is_the_plain_interval(hits: list[bool]) -> None:
    plain = wilson(sum(hits), len(hits))
    assert clustered_wilson(hits, [str(n) for n in range(len(hits))]) == plain


@given(data=st.data(), questions=st.integers(2, 12), copies=st.integers(2, 6))
def test_copies_of_an_answer_count_once(data: st.DataObject, questions: int, copies: int) -> None:
    """Where all templates of a question agree, the interval is about that of the questions."""
    answers = data.draw(st.lists(st.booleans(), min_size=questions, max_size=questions))
    hits = [answer for answer in answers for _ in range(copies)]
    clusters = [str(n) for n in range(questions) for _ in range(copies)]
    found, once = clustered_wilson(hits, clusters), wilson(sum(answers), questions)
    assert (found.count, found.n) == (sum(hits), len(hits))
    # The clustered variance divides by one cluster less than there are.
    low, high = _wilson_bounds(sum(answers) / questions, questions - 1)
    assert once.high - once.low <= found.high - found.low + 1e-12 <= high - low + 2e-12


def test_the_effective_number_is_p_q_over_the_clustered_variance() -> None:
    hits = [True, True, False, True, False, False, True, False, False, True, True, False]
    clusters = ["a", "a", "a", "b", "b", "c", "c", "d", "d", "e", "e", "e"]
    found = clustered_wilson(hits, clusters)
    assert (found.low, found.high) == pytest.approx(korn_graubard(hits, clusters))


def korn_graubard(hits: Sequence[bool], clusters: Sequence[str]) -> tuple[float, float]:
    """The interval by the effective number of trials alone, which is not monotone."""
    groups = [
        [h for h, c in zip(hits, clusters, strict=True) if c == name] for name in set(clusters)
    ]
    n, count, p = len(hits), len(groups), sum(hits) / len(hits)
    variance = sum((sum(g) - p * len(g)) ** 2 for g in groups) * count / max(1, count - 1) / n**2
    if p in (0, 1) or count == 1:
        effective = n**2 / sum(len(g) ** 2 for g in groups)
    else:
        effective = min(n, p * (1 - p) / variance) if variance > 1e-12 else n
    z = 1.959964
    centre = (p + z**2 / 2 / effective) / (1 + z**2 / effective)
    half = z / (1 + z**2 / effective) * np.sqrt(p * (1 - p) / effective + z**2 / 4 / effective**2)
    return centre - half, centre + half


@given(trials=clustered(), place=st.integers(0, 39))
def test_a_success_more_lowers_neither_end(
    trials: tuple[list[bool], list[str]], place: int
) -> None:
    hits, clusters = trials
    place %= len(hits)
    fewer, more = ([*hits[:place], hit, *hits[place + 1 :]] for hit in (False, True))
    before, after = clustered_wilson(fewer, clusters), clustered_wilson(more, clusters)
    assert after.high >= before.high - 1e-9 and after.low >= before.low - 1e-9


@given(trials=clustered(most=4, largest=3))
def test_the_upper_end_is_no_lower_than_that_of_any_fewer_successes(
    trials: tuple[list[bool], list[str]],
) -> None:
    hits, clusters = trials
    if len(set(clusters)) == len(clusters):
        return
    found = clustered_wilson(hits, clusters)
    for kept in itertools.product((False, True), repeat=len(hits)):
        fewer = [hit and keep for hit, keep in zip(hits, kept, strict=True)]
        assert found.high >= korn_graubard(fewer, clusters)[1] - 1e-9
        more = [hit or not keep for hit, keep in zip(hits, kept, strict=True)]
        assert found.low <= korn_graubard(more, clusters)[0] + 1e-9


def test_no_success_does_not_reach_farther_than_a_few() -> None:
    ends = [clustered_wilson([n < k for n in range(100)], TWENTY).high for k in range(101)]
    assert ends == sorted(ends)
    assert ends[0] == pytest.approx(wilson(0, 20).high)
    # Where every cluster has its share of successes, all trials count.
    even, plain = clustered_wilson([n % 5 == 0 for n in range(100)], TWENTY), wilson(20, 100)
    assert (even.low, even.high) == pytest.approx((plain.low, plain.high))


@given(trials=clustered())
def test_the_effective_number_gives_the_wider_side(trials: tuple[list[bool], list[str]]) -> None:
    hits, clusters = trials
    found, worth = clustered_wilson(hits, clusters), effective_trials(hits, clusters)
    assert 0 < worth <= len(hits)
    z, p = 1.959964, found.value
    centre = (p + z**2 / 2 / worth) / (1 + z**2 / worth)
    half = z / (1 + z**2 / worth) * np.sqrt(p * (1 - p) / worth + z**2 / 4 / worth**2)
    assert centre - half <= found.low + 1e-6 and found.high - 1e-6 <= centre + half
    assert centre - half == pytest.approx(found.low, abs=1e-6) or centre + half == pytest.approx(
        found.high, abs=1e-6
    )


@pytest.mark.parametrize("rate", [0.02, 0.1, 0.5])
def test_clustered_intervals_cover_the_rate(rate: float) -> None:
    """20 questions in 5 templates, of which each has a rate of its own around the true one."""
    generator = np.random.default_rng(3)
    covered = 0
    for own in generator.beta(2 * rate, 2 * (1 - rate), (300, 20)):
        hits = generator.random(100) < own.repeat(5)
        found = clustered_wilson(hits.tolist(), TWENTY)
        covered += found.low <= rate <= found.high
    assert covered >= 0.93 * 300


# -- paired tests ----------------------------------------------------------------------------------


@given(pairs=st.lists(st.tuples(st.booleans(), st.booleans()), max_size=40))
def test_with_a_cluster_each_the_sign_flip_test_is_mcnemars(
    pairs: list[tuple[bool, bool]],
) -> None:
    before, after = [b for b, _ in pairs], [a for _, a in pairs]
    found = sign_flip(before, after, [str(n) for n in range(len(pairs))])
    assert found == pytest.approx(mcnemar(before, after), rel=1e-12)


@given(data=st.data(), trials=clustered(most=9))
def test_the_sign_flip_test_counts_all_choices_of_signs(
    data: st.DataObject, trials: tuple[list[bool], list[str]]
) -> None:
    before, clusters = trials
    after = data.draw(st.lists(st.booleans(), min_size=len(before), max_size=len(before)))
    sums: dict[str, int] = {}
    for b, a, cluster in zip(before, after, clusters, strict=True):
        sums[cluster] = sums.get(cluster, 0) + b - a
    found = abs(sum(sums.values()))
    totals = [
        abs(sum(sign * one for sign, one in zip(signs, sums.values(), strict=True)))
        for signs in itertools.product((-1, 1), repeat=len(sums))
    ]
    share = sum(total >= found for total in totals) / len(totals)
    assert sign_flip(before, after, clusters) == pytest.approx(share, rel=1e-12)


def test_questions_that_flip_in_all_templates_count_once() -> None:
    before, after = [n < 10 for n in range(100)], [False] * 100
    assert mcnemar(before, after) == pytest.approx(2 / 2**10)
    assert sign_flip(before, after, TWENTY) == 0.5  # two questions
    assert sign_flip([n < 30 for n in range(100)], after, TWENTY) == pytest.approx(2 / 2**6)


def test_the_bootstrap_covers_the_difference() -> None:
    """95% intervals of a known difference cover it about 95 times in a hundred."""
    generator = np.random.default_rng(0)
    covered = 0
    for seed in range(200):
        before = generator.random(120) < 0.6
        after = before & (generator.random(120) < 0.5)  # a true difference of 0.3
        low, high = paired_bootstrap(
            before.tolist(), after.tolist(), [str(n) for n in range(120)], 500, seed
        )
        covered += low <= 0.3 <= high
    assert 180 <= covered <= 198


def test_the_bootstrap_draws_whole_questions() -> None:
    before, after = [True] * 20 + [False] * 20, [False] * 40
    alone = paired_bootstrap(before, after, [str(n) for n in range(40)])
    together = paired_bootstrap(before, after, [str(n // 10) for n in range(40)])
    assert together[1] - together[0] > 1.5 * (alone[1] - alone[0])


# -- rates -----------------------------------------------------------------------------------------


@given(count=st.integers(0, 30), more=st.integers(0, 30), name=st.sampled_from(["value", "asr"]))
def test_a_rate_is_read_as_it_was_written(count: int, more: int, name: str) -> None:
    rate = wilson(count, count + more)
    found = rate.as_dict(name)
    assert Rate.from_dict(found, name) == rate
    assert (found[name] is None) == (rate.n == 0)
    for key in [key for key in found if key.endswith("count")]:
        del found[key]  # as in older results
    assert Rate.from_dict(found, name) == rate


def test_a_rate_that_is_none_is_refused() -> None:
    for found in ({}, {"value": None, "low": 0.1, "high": 0.2, "n": 3}):
        with pytest.raises((KeyError, TypeError)):
            Rate.from_dict(found)


# -- plain intervals and tests ---------------------------------------------------------------------


@given(st.integers(1, 400), st.data())
def test_wilson_agrees_with_scipy(n: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(0, n))
    ours, theirs = wilson(count, n), binomtest(count, n).proportion_ci(method="wilson")
    assert math.isclose(ours.low, theirs.low, abs_tol=1e-6)
    assert math.isclose(ours.high, theirs.high, abs_tol=1e-6)


def test_wilson_of_nothing_says_nothing() -> None:
    rate = wilson(0, 0)
    assert (rate.low, rate.high) == (0.0, 1.0) and math.isnan(rate.value)
    with pytest.raises(ValueError, match=r"within 0\.\.3"):
        wilson(4, 3)


def test_mcnemar_is_the_exact_binomial_test() -> None:
    before = [True] * 9 + [False] * 3 + [True] * 5
    after = [False] * 9 + [True] * 3 + [True] * 5
    assert math.isclose(mcnemar(before, after), binomtest(3, 12).pvalue)
    assert mcnemar([True], [True]) == 1.0
