"""Gates fitted to several layers together, against a support vector machine on plain features."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.svm import SVC

from vlm_safeguard.calibration.gate_candidates import (
    COSTS,
    SPACED,
    SUMS,
    Candidate,
    LabelledStates,
    candidates,
)
from vlm_safeguard.calibration.gate_fitting import _Compared, _simplest, auc, fit_gate
from vlm_safeguard.calibration.stacked_states import StackedStates


def labelled(layers: int = 6, seed: int = 0) -> LabelledStates:
    """60 harmful and 90 harmless states in 8 dimensions, one of them a thousand times as large."""
    generator = torch.Generator().manual_seed(seed)
    harmful = torch.randn(60, layers, 8, generator=generator)
    harmless = torch.randn(90, layers, 8, generator=generator)
    harmful[:, 2:, 1] += 1.5
    for states in (harmful, harmless):
        states[..., 5] = states[..., 5] * 1000 + 5000
    directions = {n: torch.eye(8)[:2] for n in range(layers)}
    stacked = StackedStates.of(harmful), StackedStates.of(harmless)
    return LabelledStates(*stacked, torch.arange(60) % 3, torch.arange(90) % 3, directions)


def together(*states: StackedStates) -> torch.Tensor:
    """All states side by side, (k, L, d)."""
    every = StackedStates.of(*states)
    return torch.stack([every.layer(n) for n in range(every.parts[0][0].shape[1])], 1)


def test_a_margin_is_that_of_a_linear_machine_on_all_layers() -> None:
    """Same scores as the textbook machine on standardised states side by side, float64."""
    data = labelled()
    found = list(candidates("margin", data))
    assert [one.layers for one in found[: len(COSTS)]] == [(1, 2, 3, 4, 5)] * len(COSTS)
    states = together(data.harmful, data.harmless)[:, [1, 2, 3, 4, 5]].double().numpy()
    plain = (states - states.mean(0)) / states.std(0, ddof=1)
    plain = plain.reshape(len(plain), -1) / np.sqrt(plain[0].size)
    labels = np.arange(len(plain)) < 60
    fold = np.concatenate([data.harmful_fold, data.harmless_fold])
    for cost, one in zip(COSTS, found, strict=False):
        machine = SVC(C=cost, kernel="linear", class_weight="balanced", tol=1e-6)
        expected = machine.fit(plain, labels).decision_function(plain)
        ours = torch.einsum("nld,ld->n", torch.from_numpy(states), one.vectors().double()).numpy()
        ours += expected[0] - ours[0]  # the threshold is set apart
        assert ours == pytest.approx(expected, abs=2e-2)
        for out, (h, s) in enumerate(one.tried):
            machine.fit(plain[fold != out], labels[fold != out])
            unseen = machine.decision_function(plain)
            assert torch.cat([h, s]).numpy() == pytest.approx(unseen, abs=2e-2)


def test_where_there_are_means_two_machines_are_summed() -> None:
    """One on the states, one on the means, each as it is by itself."""
    states, means = labelled(), labelled(seed=1)
    both = replace(
        states,
        **{
            label: StackedStates.of(
                torch.cat([together(getattr(one, label)) for one in (states, means)], 2)
            )
            for label in ("harmful", "harmless")
        },
    )
    found = list(candidates("margin", both))
    apart = [list(candidates("margin", one)) for one in (states, means)]
    assert len(found) == 2 * len(apart[0]) == 2 * len(apart[1])
    for first, second, alone, summed in zip(*apart, found[::2], found[1::2], strict=True):
        assert first.layers == alone.layers == summed.layers
        torch.testing.assert_close(alone.vectors(), first.vectors())
        torch.testing.assert_close(
            summed.vectors(), torch.cat([first.vectors(), second.vectors()], 1)
        )
        for one, other, more in zip(first.tried, second.tried, summed.tried, strict=True):
            for label in (0, 1):
                torch.testing.assert_close(one[label] + other[label], more[label])


def test_a_machine_on_a_probe_is_summed_with_the_others() -> None:
    """With that on the means alone, too: the last state then counts for nothing."""
    parts = [labelled(seed=seed) for seed in range(3)]
    every = replace(
        parts[0],
        **{
            label: StackedStates.of(torch.cat([together(getattr(one, label)) for one in parts], 2))
            for label in ("harmful", "harmless")
        },
    )
    apart = [next(candidates("margin", one)) for one in parts]
    found = [one for one, _ in zip(candidates("margin", every), SUMS, strict=False)]
    assert {one.cost for one in found} == {COSTS[0]}
    for one, chosen in zip(found, SUMS, strict=True):
        vectors = [
            apart[n].vectors() if n in chosen else torch.zeros_like(apart[n].vectors())
            for n in range(max(chosen) + 1)
        ]
        torch.testing.assert_close(one.vectors(), torch.cat(vectors, 1))
        for out, pair in enumerate(one.tried):
            for label in (0, 1):
                summed = sum(apart[n].tried[out][label] for n in chosen)
                torch.testing.assert_close(pair[label], summed)


def test_the_simplest_of_those_near_the_best_is_chosen() -> None:
    """Near is within the standard error of the best one's mean over folds."""
    generator = torch.Generator().manual_seed(0)
    fold = torch.arange(200) % 5
    noise, harmless = torch.randn(2, 200, generator=generator)

    def compared(cost: float, distance: float) -> _Compared:
        value = auc(noise + distance, harmless, 0.05)
        candidate = Candidate((0,), [], lambda: torch.empty(0), cost)
        return _Compared(candidate, (0.0, 0.0), 1.0, noise + distance, harmless, value)

    best = compared(10.0, 2.0)
    by_fold = [auc(best.harmful[fold == n], best.harmless[fold == n], 0.05) for n in range(5)]
    error = float(torch.tensor(by_fold).std()) / 5**0.5
    near, low, far = compared(3.0, 1.96), compared(3.0, 1.94), compared(1.0, 1.0)
    assert best.value > near.value > low.value > best.value - error > far.value
    assert _simplest([far, low, near, best], fold, fold, 0.05) is near
    assert _simplest([far, best], fold, fold, 0.05) is best


def test_a_mean_finds_what_the_last_state_hides() -> None:
    generator = torch.Generator().manual_seed(0)
    label = torch.arange(600) < 300
    states = torch.randn(600, 4, 12, generator=generator)
    states[:, 1:, 6:] += 1.5 * label[:, None, None]  # the means alone tell harm
    directions = {n: torch.eye(6)[:1] for n in range(4)}
    fold = torch.arange(300) % 5
    wide, narrow = (
        fit_gate(seen[label], seen[~label], fold, fold, directions, 0.02)
        for seen in (states, states[..., :6])
    )
    assert wide.vectors.shape[1] == 12 and narrow.vectors.shape[1] == 6
    assert wide.unseen_rates[0] > 0.95 > 0.3 > narrow.unseen_rates[0]
    assert wide.scores(states).shape == narrow.scores(states).shape == (600,)
    assert torch.equal(narrow.scores(states), narrow.scores(states[..., :6]))


def test_layers_are_spaced_evenly_and_few() -> None:
    layers = {one.layers for one in candidates("margin", labelled(layers=40))}
    assert layers == {tuple(range(6, 40, 4)), tuple(range(6, 27, 3))}
    assert max(len(one) for one in layers) <= SPACED
    assert {one.layers for one in candidates("margin", labelled(layers=1))} == {(0,)}


def test_layers_are_weighed_against_each_other() -> None:
    """Every layer holds the same disturbance, which one layer shows alone: a sum of vectors that
    were fitted to single layers can't take it out, a joint fit can."""
    generator = torch.Generator().manual_seed(0)
    label = torch.arange(600) < 300
    harm, disturbance = label * 1.0, torch.randn(600, generator=generator)
    states = torch.randn(600, 4, 6, generator=generator) * 0.1
    states[:, 1:3, 0] += (harm + 2 * disturbance)[:, None]
    states[:, 3, 0] += disturbance
    directions = {n: torch.eye(6)[:1] for n in range(4)}
    fold = torch.arange(300) % 5
    found = [
        fit_gate(states[label], states[~label], fold, fold, directions, 0.02, kinds=[kind])
        for kind in ("components", "margin")
    ]
    apart, joint = (fit.unseen_rates[0] for fit in found)
    assert joint > 0.95 > 0.5 > apart
    assert all(fit.unseen_rates[1] <= 0.02 for fit in found)


def test_states_that_are_not_finite_are_refused() -> None:
    data = labelled()
    data.harmful.parts[0][0][3, 2, 1] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        next(candidates("margin", data))
