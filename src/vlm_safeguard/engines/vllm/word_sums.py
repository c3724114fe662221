"""Sums the states over the words of texts, pass by pass, for gates that read their mean.

vLLM computes a text in one pass or in several, and after a preemption once more.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from vlm_safeguard.artifact.config import TextFrame
from vlm_safeguard.errors import GuardRuntimeError
from vlm_safeguard.model.words import word_weights


class WordSums:
    """The sums of one text, over the tokens that were computed so far.

    Attributes:
        by_layer: (d,) each, float32. After the last word they are the means.
    """

    def __init__(self, width: int, frame: TextFrame) -> None:
        """``width``: number of its tokens."""
        self.by_layer: dict[int, Tensor] = {}
        self._weights = word_weights(torch.tensor([width]), width, frame)[0]  # (width,)
        self._stop = 0  # the column that comes next

    def begin(self, columns: range) -> Tensor:
        """The weights, at most (columns,), of tokens that a pass is about to compute. Where they do
        not follow those of the pass before, the sums begin anew.

        Raises:
            GuardRuntimeError: there are words in front of them that no pass has shown.
        """
        if columns.start != self._stop:
            self.by_layer.clear()
            if self._weights[: columns.start].any():
                raise GuardRuntimeError(
                    "words of its text were not computed under guard, and a gate reads their mean"
                )
        self._stop = columns.stop
        return self._weights[columns.start : columns.stop]


class WordReading:
    """The tokens of texts in one pass, and the sums that they are added to."""

    def __init__(self) -> None:
        self._texts: list[WordSums] = []
        # Places of those whose last token is in the pass, and of the others.
        self._ended: list[int] = []
        self._going_on: list[int] = []
        self._places: list[Tensor] = []
        self._weights: list[Tensor] = []
        self._owners: list[Tensor] = []  # of each token: the place of its text
        self._tokens: tuple[Tensor, Tensor, Tensor] | None = None  # where the states are

    def __len__(self) -> int:
        return len(self._texts)

    def add(self, text: WordSums, start: int, columns: range, ends: bool) -> None:
        """Take a text in.

        Args:
            text: its sums.
            start: its first token in the flattened batch.
            columns: those of its own that the pass computes.
            ends: whether its last token is among them.

        Raises:
            GuardRuntimeError: as ``WordSums.begin``.
        """
        weights = text.begin(columns)
        words = weights.nonzero().flatten()
        self._places.append(start + words)
        self._weights.append(weights[words])
        self._owners.append(torch.full_like(words, len(self._texts)))
        (self._ended if ends else self._going_on).append(len(self._texts))
        self._texts.append(text)

    def means(
        self, layer: int, states_at: Callable[[Tensor], Tensor], device: torch.device
    ) -> Tensor:
        """Add a layer's states, and return the means (b, d) of the texts that end, in order.

        ``states_at``: gives the states (n, d) at places (n,) of the flattened batch.
        """
        if self._tokens is None:
            parts = (self._places, self._weights, self._owners)
            places, weights, owners = (torch.cat(part).to(device) for part in parts)
            self._tokens = places, weights[:, None], owners
        places, weights, owners = self._tokens
        states = states_at(places).float() * weights
        # Not a product of matrices: the NaN of one text would be in the sums of all.
        sums = states.new_zeros(len(self._texts), states.shape[1]).index_add_(0, owners, states)
        for number, text in enumerate(self._texts):
            if layer in text.by_layer:
                sums[number] += text.by_layer[layer]
        for number in self._going_on:  # copied: a view would keep the sums of all in memory
            self._texts[number].by_layer[layer] = sums[number].clone()
        return sums[self._ended]
