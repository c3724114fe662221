"""Tokens against the distribution that they are drawn from."""

from __future__ import annotations

import torch

from vlm_safeguard.server.job import Sampling
from vlm_safeguard.server.token_sampling import RowSampling


def test_tokens_come_as_often_as_their_probability_says() -> None:
    scores = torch.tensor([2.0, 1.0, 0.0, -1.0]).log_softmax(0)
    expected = torch.softmax(scores / 0.7, 0)
    kept = expected.cumsum(0) - expected < 0.9  # the fewest that reach top-p
    expected = torch.where(kept, expected, 0.0) / expected[kept].sum()
    draws = 4000
    rows = [Sampling(1, temperature=0.7, top_p=0.9, seed=seed) for seed in range(draws)]
    chosen = RowSampling(rows)(torch.zeros(draws, 1), scores.repeat(draws, 1)).argmax(1)
    often = torch.bincount(chosen, minlength=4) / draws
    assert often[~kept].sum() == 0
    assert torch.allclose(often, expected, atol=4 * (0.25 / draws) ** 0.5)


def test_a_row_draws_the_same_whoever_is_beside_it() -> None:
    torch.manual_seed(0)
    scores = torch.randn(2, 50)
    own = Sampling(1, temperature=1.0, seed=7)
    alone = RowSampling([own])(torch.zeros(1, 1), scores[:1]).argmax(1)
    for mate in (Sampling(1), Sampling(1, temperature=2.0, seed=1)):
        beside = RowSampling([own, mate])(torch.zeros(2, 1), scores).argmax(1)
        assert beside[0] == alone[0]
    greedy = RowSampling([own, Sampling(1)])(torch.zeros(2, 1), scores)
    assert torch.equal(greedy[1], scores[1])
