"""Chooses tokens row by row, so that requests with different settings share a batch.

``generate`` has one temperature and one random state for a whole batch. Here each row has its own:
the processor leaves only the chosen token of a row possible, and greedy search takes it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import LogitsProcessor

from vlm_safeguard.server.job import Sampling


class RowSampling(LogitsProcessor):
    """Samples each row with its own temperature, top-p and seed.

    Attributes:
        broken: rows whose scores were not finite once. Their tokens mean nothing.
    """

    def __init__(self, rows: Sequence[Sampling]) -> None:
        self._rows = rows
        self.broken: set[int] = set()
        self._generators = {n: _generator(row) for n, row in enumerate(rows) if row.temperature}

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores (B, vocabulary) with one finite entry in every sampled row."""
        # The largest is NaN if any is, and -inf if no token is left.
        self.broken.update((~torch.isfinite(scores.amax(1))).nonzero()[:, 0].tolist())
        sampled = {n: made for n, made in self._generators.items() if n not in self.broken}
        if not sampled:
            return scores
        chosen = scores.clone()
        for n, generator in sampled.items():
            token = _sample(scores[n].double().cpu(), self._rows[n], generator)
            chosen[n] = -torch.inf
            chosen[n, token] = 0.0
        return chosen


def _generator(row: Sampling) -> torch.Generator:
    generator = torch.Generator()
    if row.seed is None:
        generator.seed()
    else:
        generator.manual_seed(row.seed)
    return generator


def _sample(scores: Tensor, row: Sampling, generator: torch.Generator) -> int:
    """A token of (vocabulary,) float64 scores: the fewest likely ones that reach top-p together
    count."""
    # The largest is 0, so that the smallest temperature divides nothing into infinity - infinity.
    scores = (scores - scores.max()) / row.temperature
    chances, tokens = torch.softmax(scores, 0).sort(descending=True)
    before = chances.cumsum(0) - chances
    chances = torch.where(before < row.top_p, chances, 0.0)
    return int(tokens[torch.multinomial(chances, 1, generator=generator)])
