"""Recorded hidden states with their labels and folds, to which gates are fitted."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vlm_safeguard.calibration.gate_fitting import GateFit
from vlm_safeguard.calibration.stacked_states import StackedStates


@dataclass(frozen=True)
class States:
    """Hidden states of k prompts at L layers, with labels and cross-validation folds."""

    ids: tuple[str, ...]  # k ids of prompts
    # (k, L, d); of text up to (k, L, 3 d), with all that is read of it (``model.words.readings``)
    states: Tensor | StackedStates
    harmful: Tensor  # (k,) bool
    fold: Tensor  # (k,); a question and its copy in a template share a fold
    # (k,) bool: harmful prompts that count as found, and harmless ones as false positives. To the
    # others gates are fitted only.
    counted: Tensor
    signs: Tensor | None = None  # (k, 2) refusal signs (``runtime.gate``), of text

    def split(self) -> tuple[StackedStates, StackedStates]:
        """States of the harmful and of the harmless prompts."""
        every = StackedStates.of(self.states)
        return every.chosen(self.harmful), every.chosen(~self.harmful)

    def split_signs(self) -> tuple[Tensor, Tensor] | None:
        """Refusal signs of the harmful and of the harmless prompts, if they were recorded."""
        if self.signs is None:
            return None
        return self.signs[self.harmful], self.signs[~self.harmful]

    def scores(self, fit: GateFit) -> tuple[Tensor, Tensor]:
        """A gate's scores of the harmful and of the harmless prompts."""
        found = fit.scores(self.states, self.signs)
        return found[self.harmful], found[~self.harmful]

    def folds(self) -> tuple[Tensor, Tensor]:
        """Folds of the harmful and of the harmless prompts."""
        return self.fold[self.harmful], self.fold[~self.harmful]

    def split_counted(self) -> tuple[Tensor, Tensor]:
        """Which of the harmful prompts count as found, and which of the harmless ones as false
        positives."""
        return self.counted[self.harmful], self.counted[~self.harmful]


@dataclass(frozen=True)
class Readings:
    """What the text gate reads beside the text of the harmless prompts: canonical forms and single
    sentences, each once. Their signs have no verdict: that of a canonical form is in its prompt's.

    Attributes:
        states: as those of the prompts as text; k may be 0.
        signs: refusal signs (k, 2); zero if the model's refusals have no known openings.
        of: places (m, 2) of a harmless prompt among the harmless prompts and of one of its readings
            among the readings: prompt by prompt, of each its canonical form first.
    """

    states: Tensor
    signs: Tensor
    of: Tensor


@dataclass(frozen=True)
class Recorded:
    """What gates are fitted to.

    Attributes:
        pairs: states of the N anchor pairs as text, (2, N, L, d) or wider: harmful, then harmless.
        directions: safety directions by layer.
        openings: tokens that the model's refusals begin with; may be empty.
        text: states of the calibration prompts as text.
        readings: others of the harmless ones of these prompts.
        pictured: states with a blank image and with a picture, by setting.
        untold: ids of prompts whose label does not show in what the text gate reads.
        refusals: mean states (k, L, d) behind the first k tokens of the model's refusals of the
            harmful anchors, as text; None if it has too few.
    """

    pairs: Tensor
    directions: dict[int, Tensor]
    openings: list[int]
    text: States
    readings: Readings
    pictured: dict[str, States]
    untold: frozenset[str]
    refusals: Tensor | None = None

    def text_only_states(self) -> States:
        """States that the text gate is fitted to: prompts as text, anchors, and other readings.

        Without sentences of harmless prompts the gate opens on some that are no request by
        themselves, such as the beginning of a story.

        Anchors and readings get a negative fold: the gate is fitted to them but not judged by them.
        The directions come from the anchors and separate them better than other prompts, and a
        sentence is no request.
        """
        text, (harmful, harmless), more = self.text, self.pairs, self.readings
        count = len(harmful) + len(harmless)
        labels = torch.arange(count + len(more.states)) < len(harmful)
        signs = None
        if text.signs is not None:
            signs = torch.cat([text.signs, torch.zeros(count, 2), more.signs])
        return States(
            text.ids + ("",) * len(labels),
            StackedStates.of(text.states, harmful, harmless, more.states),
            torch.cat([text.harmful, labels]),
            torch.cat([text.fold, torch.full((len(labels),), -1)]),
            torch.cat([text.counted, torch.ones_like(labels)]),
            signs,
        )

    def parts(self) -> Tensor:
        """Where the other readings stand in ``text_only_states``, for ``fit_gate``."""
        first = int((~self.text.harmful).sum()) + self.pairs.shape[1]
        return self.readings.of + torch.tensor([0, first])

    def vlm_states(self) -> States:
        """States that the gate in the VLM is fitted to: prompts in all settings with a picture, and
        as text. The gate is not judged by the text, but harm lies in the same directions there, and
        many more prompts are recorded so."""
        width = next(iter(self.directions.values())).shape[1]
        none = torch.zeros_like(self.text.counted)
        every = [*self.pictured.values(), replace(self.text, counted=none)]
        return States(
            tuple(one for s in every for one in s.ids),
            StackedStates.of(*(s.states for s in every)).narrowed(width),
            torch.cat([s.harmful for s in every]),
            torch.cat([s.fold for s in every]),
            torch.cat([s.counted for s in every]),
        )

    def found_together(self, texts: Sequence[GateFit], vlm: GateFit) -> Tensor:
        """Cross-validated scores (m, n) of the harmful prompts with a picture by text gates and by
        the gate in the VLM, which comes last; for ``useful_gates``.

        A text gate does not open on a prompt that it cannot tell from a harmless one.
        """
        # All were fitted to the harmful prompts of ``text`` first, in this order.
        untold = dict.fromkeys(self.untold, -math.inf)
        by = [untold | dict(_judged_scores([self.text], fit)) for fit in texts]
        rows = [
            [*(scores[one] for scores in by), score]
            for one, score in _judged_scores(self.pictured.values(), vlm)
            if all(one in scores for scores in by)
        ]
        return torch.tensor(rows).reshape(-1, len(texts) + 1)


def _judged_scores(parts: Iterable[States], gate: GateFit) -> list[tuple[str, float]]:
    """Ids and cross-validated scores of the harmful prompts that a gate was fitted to and judged
    by, in this order; behind them may be others that it was only fitted to."""
    ids = [
        one
        for part in parts
        for one, harmful in zip(part.ids, part.harmful, strict=True)
        if harmful
    ]
    judged = [one for one, used in zip(ids, gate.judged, strict=False) if used]
    return list(zip(judged, gate.unseen[0].tolist(), strict=True))
