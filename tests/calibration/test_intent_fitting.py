"""Fitting a gate to hidden states and refusal intents together."""

import pytest
import torch

from vlm_safeguard.calibration.gate_fitting import fit_gate


def test_the_gate_adds_what_the_intent_knows() -> None:
    """States and intent each see half of the harm: together they find nearly all of it."""
    generator = torch.Generator().manual_seed(0)
    count = 400
    harmful, harmless = (torch.randn(count, 3, 8, generator=generator) for _ in range(2))
    seen = torch.arange(count) % 2 == 0
    harmful[seen, 1, 0] += 8
    signs = torch.zeros(2, count, 2)
    signs[..., 0] = torch.randn(2, count, generator=generator) - 6
    signs[0, ~seen, 0] += 8
    fold = torch.arange(count) // 2 % 5
    fold[:4] = -1
    directions = {n: torch.eye(8)[:4] for n in range(3)}
    apart = fit_gate(harmful, harmless, fold, fold, directions, 0.02)
    both = fit_gate(
        harmful, harmless, fold, fold, directions, 0.02, signs=tuple(signs), openings=[3]
    )  # type: ignore[arg-type]
    assert apart.openings == () and both.openings == (3,) and both.weights[0] > 0
    assert apart.unseen_rates[0] < 0.7 and both.unseen_rates[0] > 0.95
    assert both.unseen_rates[1] <= 0.02
    fresh = torch.randn(2, 2000, 3, 8, generator=generator)
    words = torch.zeros(2, 2000, 2)
    words[..., 0] = torch.randn(2, 2000, generator=generator) - 6
    half = torch.arange(2000) % 2 == 0
    fresh[0, half, 1, 0] += 8
    words[0, ~half, 0] += 8
    opened = [both.scores(s, i) > 0 for s, i in zip(fresh, words, strict=True)]
    assert opened[0].double().mean() > 0.95 and opened[1].double().mean() < 0.05
    with pytest.raises(ValueError, match="intent"):
        both.scores(fresh[0])


def test_the_verdict_opens_the_gate_where_it_separates() -> None:
    """What the LLM itself would refuse opens the gate, whatever its states say."""
    generator = torch.Generator().manual_seed(0)
    count = 400
    harmful, harmless = (torch.randn(count, 3, 8, generator=generator) for _ in range(2))
    refused = torch.arange(count) % 2 == 0
    harmful[~refused, 1, 0] += 8
    harmful[refused, 1, 0] -= 3
    signs = torch.zeros(2, count, 2)
    signs[..., 0] = torch.randn(2, count, generator=generator) - 6
    signs[0, refused, 1] = 1
    fold = torch.arange(count) // 2 % 5
    directions = {n: torch.eye(8)[:4] for n in range(3)}
    fitted = fit_gate(
        harmful, harmless, fold, fold, directions, 0.02, signs=(signs[0], signs[1]), openings=[3]
    )
    assert fitted.weights[1] > 0 and fitted.unseen_rates[0] > 0.95
    assert (fitted.scores(harmful, signs[0]) > 0)[refused].all()
    signs[1, refused, 1] = 1  # a verdict that harmless requests get as often
    without = fit_gate(
        harmful, harmless, fold, fold, directions, 0.02, signs=(signs[0], signs[1]), openings=[3]
    )
    assert without.weights[1] == 0
