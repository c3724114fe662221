"""Sums the states over the words of texts, pass by pass, for gates that read their mean.

vLLM computes a text in one pass or in several, and after a preemption once more. Where a probe
stands behind a text, the state at the last token of the text itself is kept in the same way.
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
        by_layer: (k, d) each, float32: over the words and, where there is a probe, in front of that
            the state at the last token before it. After the last word they are the means.
    """

    def __init__(self, width: int, frame: TextFrame) -> None:
        """``width``: number of its tokens, those of the probe among them."""
        self.by_layer: dict[int, Tensor] = {}
        weights = word_weights(torch.tensor([width]), width, frame)  # (1, width)
        if frame.probe:
            last = torch.zeros(1, width)
            last[0, width - 1 - len(frame.probe)] = 1.0
            weights = torch.cat([last, weights])
        self._weights = weights  # (k, width)
        self._stop = 0  # the column that comes next

    def __len__(self) -> int:
        return len(self._weights)

    def begin(self, columns: range) -> Tensor:
        """The weights, at most (k, columns), of tokens that a pass is about to compute. Where they
        do not follow those of the pass before, the sums begin anew.

        Raises:
            GuardRuntimeError: there are words in front of them that no pass has shown.
        """
        if columns.start != self._stop:
            self.by_layer.clear()
            if self._weights[:, : columns.start].any():
                raise GuardRuntimeError(
                    "words of its text were not computed under guard, and a gate reads all of them"
                )
        self._stop = columns.stop
        return self._weights[:, columns.start : columns.stop]


class WordReading:
    """The tokens of texts in one pass, and the sums that they are added to."""

    def __init__(self) -> None:
        self._texts: list[WordSums] = []
        # Places of those whose last token is in the pass, and of the others.
        self._ended: list[int] = []
        self._going_on: list[int] = []
        # Of each token that is added: its place in the batch, its weight, and the sum it belongs to
        # (that of a text, and of its k sums).
        self._places: list[Tensor] = []
        self._weights: list[Tensor] = []
        self._owners: list[Tensor] = []
        self._tokens: dict[bool, tuple[Tensor, Tensor, Tensor]] = {}  # where the states are

    def __len__(self) -> int:
        return len(self._texts)

    def add(self, text: WordSums, start: int, columns: range, ends: bool) -> None:
        """Take a text in.

        Args:
            text: its sums; all texts have as many.
            start: its first token in the flattened batch.
            columns: those of its own that the pass computes.
            ends: whether its last token is among them.

        Raises:
            GuardRuntimeError: as ``WordSums.begin``.
        """
        weights = text.begin(columns)
        sums, words = weights.nonzero().unbind(1)
        self._places.append(start + words)
        self._weights.append(weights[sums, words])
        self._owners.append(len(self._texts) * len(text) + sums)
        (self._ended if ends else self._going_on).append(len(self._texts))
        self._texts.append(text)

    def read(
        self,
        layer: int,
        states_at: Callable[[Tensor], Tensor],
        device: torch.device,
        words: bool = True,
    ) -> Tensor:
        """Add a layer's states, and return the sums (b, k, d) of the texts that end, in order.

        Args:
            states_at: gives the states (n, d) at places (n,) of the flattened batch.
            words: whether the last sum, over the words, is needed; else it stays zero.
        """
        count = len(self._texts[0])
        if words not in self._tokens:
            places, weights, owners = map(torch.cat, (self._places, self._weights, self._owners))
            chosen = torch.ones_like(owners, dtype=torch.bool)
            if not words:
                chosen = owners % count < count - 1
            self._tokens[words] = (
                places[chosen].to(device),
                weights[chosen][:, None].to(device),
                owners[chosen].to(device),
            )
        places, weights, owners = self._tokens[words]
        states = states_at(places).float() * weights
        # Not a product of matrices: the NaN of one text would be in the sums of all.
        sums = states.new_zeros(len(self._texts) * count, states.shape[1])
        sums = sums.index_add_(0, owners, states).view(len(self._texts), count, -1)
        for number, text in enumerate(self._texts):
            if layer in text.by_layer:
                sums[number] += text.by_layer[layer]
        for number in self._going_on:  # copied: a view would keep the sums of all in memory
            self._texts[number].by_layer[layer] = sums[number].clone()
        return sums[self._ended]
