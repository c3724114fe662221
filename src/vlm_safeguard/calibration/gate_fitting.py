"""Chooses a gate among candidates by how well its scores separate unseen prompts, and sets its
threshold."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from vlm_safeguard.calibration.gate_candidates import (
    Candidate,
    Kind,
    LabelledStates,
    candidates,
)
from vlm_safeguard.calibration.stacked_states import StackedStates
from vlm_safeguard.runtime.gate import IntentGate, LinearGate

GateName = Literal["text", "vlm"]  # see ``gate_choice``
KINDS: tuple[Kind, ...] = ("margin",)
# False-positive rate up to which candidates are compared. At the budget itself, two or three
# harmless prompts would decide between them.
COMPARED = 0.05
# What the refusal intent and the verdict may add to a score, in units of the spread over harmless
# prompts. The largest weight of the verdict opens the gate for whatever the LLM refuses as text.
Weights = Sequence[tuple[float, float]]
INTENT: Weights = [(intent, 0.0) for intent in (0.0, 0.25, 0.5, 1.0)]
INTENT_AND_VERDICT: Weights = [
    (intent, verdict) for intent, _ in INTENT for verdict in (0.0, 0.5, 1.0, 2.0, 20.0)
]


def auc(harmful: Tensor, harmless: Tensor, max_fpr: float | None = None) -> float:
    """Area under the ROC curve of scores (n,) and (k,): P(harmful > harmless), ties half.

    With ``max_fpr`` only the part up to this false-positive rate, scaled so that 0.5 is chance and
    1 the best (McClish, 1989).
    """
    from sklearn.metrics import roc_auc_score  # takes a second to import

    labels = [True] * len(harmful) + [False] * len(harmless)
    scores = torch.cat([harmful, harmless]).double().numpy()
    return float(roc_auc_score(labels, scores, max_fpr=max_fpr))


def threshold(harmful: Tensor, harmless: Tensor, budget: float) -> float:
    """A threshold whose false-positive rate on ``harmless`` is at most ``budget``.

    It is the score of the harmless prompts at the budget's quantile. If all but 1% of the harmful
    prompts score higher, it is moved to the middle of the gap, so that unseen prompts have room on
    both sides.

    Args:
        harmful, harmless: scores (n,) and (k,).
        budget: allowed false-positive rate.
    """
    ranked = harmless.sort(descending=True).values
    allowed = int(budget * len(ranked))
    lowest = ranked[min(allowed, len(ranked) - 1)]
    missed = harmful.sort().values[int(0.01 * len(harmful))]
    return float((lowest + missed) / 2 if missed > lowest else lowest)


@dataclass(frozen=True)
class GateFit:
    """A fitted gate: its score is the sum of ``h_l . vectors_l``, plus the weighted refusal signs
    where it has ``openings``, minus ``threshold``.

    Attributes:
        layers: the layers it reads.
        vectors: one vector for each layer, (n, d), or as wide as all that it reads of a text, up
            to (n, 3 d).
        openings: tokens that the LLM's refusals begin with, see ``method.refusal_intent``.
        weights: of the refusal intent and of the verdict.
        spread: standard deviation of the scores of harmless prompts, cross-validated.
        unseen: cross-validated scores of harmful and harmless prompts, minus the threshold and
            divided by ``spread``.
        judged: which of the harmful prompts ``unseen`` is about.
        verdicts: those of the prompts that ``unseen`` is about; None if they were not recorded.
    """

    layers: tuple[int, ...]
    vectors: Tensor
    threshold: float
    openings: tuple[int, ...] = ()
    weights: tuple[float, float] = (0.0, 0.0)
    spread: float = 1.0
    unseen: tuple[Tensor, Tensor] = (torch.empty(0), torch.empty(0))
    judged: tuple[bool, ...] = ()
    verdicts: tuple[Tensor, Tensor] | None = None

    @property
    def unseen_rates(self) -> tuple[float, float]:
        """Cross-validated true- and false-positive rates."""
        harmful, harmless = ((scores > 0).double().mean().item() for scores in self.unseen)
        return harmful, harmless

    def heeding(self, weight: float, openings: Sequence[int]) -> GateFit:
        """The gate with the verdict added to its score: ``weight`` units of ``spread`` where the
        LLM would refuse the text.

        Args:
            openings: the tokens that the verdict is about.

        Raises:
            ValueError: the gate has no ``verdicts``.
        """
        if self.verdicts is None:
            raise ValueError("no verdicts were recorded of the prompts that the gate was fitted to")
        harmful, harmless = (
            # A harmless prompt may score highest in a sentence, which has no verdict: then this is
            # too high, and so is the false-positive rate.
            scores + weight * said
            for scores, said in zip(self.unseen, self.verdicts, strict=True)
        )
        weights = self.weights[0], self.weights[1] + weight * self.spread
        return replace(self, openings=tuple(openings), weights=weights, unseen=(harmful, harmless))

    def moved(self, shift: float) -> GateFit:
        """The gate with its threshold moved up by ``shift`` units of ``spread``."""
        harmful, harmless = self.unseen
        unseen = harmful - shift, harmless - shift
        return replace(self, threshold=self.threshold + shift * self.spread, unseen=unseen)

    def scores(self, states: Tensor | StackedStates, signs: Tensor | None = None) -> Tensor:
        """Scores (k,) of states (k, L, d), or of all that is read of a text, up to (k, L, 3 d);
        positive opens the gate.

        Args:
            signs: refusal signs (k, 2), for a gate with ``openings``.

        Raises:
            ValueError: the gate has ``openings`` and there are no signs.
        """
        none = torch.zeros(len(self.layers))
        gate = LinearGate(self.vectors, none)
        if self.openings:
            openings, weights = torch.tensor(self.openings), torch.tensor(self.weights)
            gate = IntentGate(self.vectors, none, openings, weights)
        every, width = StackedStates.of(states), self.vectors.shape[1]
        found = torch.zeros(len(every), len(self.layers))
        for n, layer in enumerate(self.layers):
            seen = every.layer(layer, slice(width))[:, None]
            found[:, n] = gate.scores(seen, slice(n, n + 1))[:, 0]
        return gate.summed(found, signs) - self.threshold


def fit_gate(
    harmful: Tensor | StackedStates,
    harmless: Tensor | StackedStates,
    harmful_fold: Tensor,
    harmless_fold: Tensor,
    directions: dict[int, Tensor],
    budget: float,
    *,
    kinds: Sequence[Kind] = KINDS,
    pooled: bool = True,
    counted: tuple[Tensor, Tensor] | None = None,
    signs: tuple[Tensor, Tensor] | None = None,
    weights: Weights = INTENT_AND_VERDICT,
    openings: Sequence[int] = (),
    parts: Tensor | None = None,
) -> GateFit:
    """Fit the gate that best separates harmful prompts at low false-positive rates.

    Candidates (``gate_candidates``) are compared, and the threshold is set, by cross-validation: on
    the prompts that vectors are fitted to, harmful and harmless scores are further apart than on
    others. Of those within one standard error of the best, the simplest is taken, and of these the
    best (Breiman et al. 1984): prompts of another kind than these are then separated better.

    With ``signs`` the score is the sum of the linear score, of the refusal intent and of the
    verdict, with the weights that separate best.

    Args:
        harmful, harmless: states of calibration prompts, see ``LabelledStates``; also as tensors.
        harmful_fold, harmless_fold: fold of each prompt, (k,). Copies of a question share a fold.
            Prompts with a negative fold are used for fitting only.
        directions: V_l by layer.
        budget: allowed false-positive rate.
        kinds: the candidates to try.
        pooled: whether to try runs of layers too; "margin" reads several in any case.
        counted: which harmful prompts count as found and which harmless ones as false positives,
            (k,) bool each; by default all. The others are used for fitting only.
        signs: refusal signs of the harmful and the harmless prompts, (k, 2) each.
        weights: pairs of weights of the two signs to try.
        openings: the tokens that the signs are about.
        parts: places (m, 2) among the harmless prompts of a prompt and of one of its sentences. The
            gate reads sentences too, so a prompt is judged by the highest of their scores.

    Raises:
        ValueError: the scores are not finite.
    """
    stacked = StackedStates.of(harmful), StackedStates.of(harmless)
    data = LabelledStates(*stacked, harmful_fold, harmless_fold, directions)
    folds = torch.tensor(data.folds)
    known_harmful = torch.isin(harmful_fold, folds)
    judged = torch.isin(harmless_fold, folds)
    if counted is not None:
        known_harmful, judged = known_harmful & counted[0], judged & counted[1]
    said = _Said.of(signs, judged)
    weighed: Weights = [(0.0, 0.0)] if signs is None else weights
    compared: list[_Compared] = []
    for candidate in (one for kind in kinds for one in candidates(kind, data, pooled)):
        tried = []
        for fold, (h, s) in zip(data.folds, candidate.tried, strict=True):
            known = s[(harmless_fold != fold) & judged]
            centre, spread = known.mean(), known.std().clamp(min=1e-12)
            tried.append(((h - centre) / spread, (s - centre) / spread))
        unit = float(_out_of_fold(tried, data)[1][judged].std().clamp(min=1e-12))
        for pair in weighed:
            h, s = _out_of_fold([said.added(*one, unit, pair, parts) for one in tried], data)
            h, s = h[known_harmful], s[judged]
            value = auc(h, s, max(COMPARED, budget))
            if not math.isnan(value):
                compared.append(_Compared(candidate, pair, unit, h, s, value))
    if not compared:
        raise ValueError("no gate can be judged: scores of the states are not finite")
    in_fold = harmful_fold[known_harmful], harmless_fold[judged]
    chosen = _simplest(compared, *in_fold, max(COMPARED, budget))
    h, s, best_weights, best_unit = chosen.harmful, chosen.harmless, chosen.weights, chosen.unit
    cut, spread = threshold(h, s, budget), s.std().clamp(min=1e-12)
    # Threshold and spread are in units of the spread of the harmless scores in each fold: convert
    # them to that of the final vectors.
    best = GateFit(
        chosen.candidate.layers,
        chosen.candidate.vectors(),
        cut,
        spread=float(spread),
        unseen=((h - cut) / spread, (s - cut) / spread),
    )
    seen = replace(best, threshold=0.0).scores(data.harmless.chosen(judged))
    scale = float(seen.std()) * best_unit
    verdicts = None
    if signs is not None:
        verdicts = signs[0][known_harmful, 1], signs[1][judged, 1]
    used = tuple(known_harmful.tolist())
    best = replace(best, spread=best.spread * scale, judged=used, verdicts=verdicts)
    cut = float(seen.mean()) + best.threshold * scale
    if not any(best_weights):
        return replace(best, threshold=cut)
    final = best_weights[0] * scale / said.unit, best_weights[1] * scale
    cut += final[0] * said.centre
    return replace(best, threshold=cut, openings=tuple(openings), weights=final)


@dataclass(frozen=True)
class _Compared:
    """A candidate with weights of the refusal signs, and how it does: its cross-validated scores
    (n,) and (k,) of the prompts that it is judged by, in units of ``unit``, and their AUC."""

    candidate: Candidate
    weights: tuple[float, float]
    unit: float
    harmful: Tensor
    harmless: Tensor
    value: float


def _simplest(
    compared: Sequence[_Compared], harmful_fold: Tensor, harmless_fold: Tensor, max_fpr: float
) -> _Compared:
    """Of what is within one standard error of the best, the best of those with the lowest cost.

    The error is that of the mean over folds. A gate without a margin is simpler than any with one.

    Args:
        harmful_fold, harmless_fold: of each score, (n,) and (k,).
        max_fpr: as in ``auc``.
    """
    best = max(compared, key=lambda one: one.value)
    by_fold = torch.tensor(
        [
            auc(best.harmful[harmful_fold == n], best.harmless[harmless_fold == n], max_fpr)
            for n in sorted(set(harmful_fold.tolist()) & set(harmless_fold.tolist()))
        ]
    )
    error = float(by_fold.std() / math.sqrt(len(by_fold))) if len(by_fold) > 1 else 0.0
    near = [one for one in compared if one.value >= best.value - error]
    lowest = min(one.candidate.cost for one in near)
    return max((one for one in near if one.candidate.cost == lowest), key=lambda one: one.value)


def _out_of_fold(
    tried: Sequence[tuple[Tensor, Tensor]], data: LabelledStates
) -> tuple[Tensor, Tensor]:
    """Scores (n,) and (k,) of each prompt by the gate that was fitted without its fold; zero for
    prompts of no fold."""
    found = torch.zeros(len(data.harmful)), torch.zeros(len(data.harmless))
    for fold, scores in zip(data.folds, tried, strict=True):
        for all_scores, some, place in zip(
            found, scores, (data.harmful_fold, data.harmless_fold), strict=True
        ):
            all_scores[place == fold] = some[place == fold]
    return found


@dataclass(frozen=True)
class _Said:
    """Refusal signs of all harmful and harmless prompts: the intent minus ``centre`` and in units
    of ``unit``, which are its mean and spread over the judged harmless ones, and the verdict."""

    intent: tuple[Tensor, Tensor]
    verdict: tuple[Tensor, Tensor]
    centre: float
    unit: float

    @classmethod
    def of(cls, signs: tuple[Tensor, Tensor] | None, judged: Tensor) -> _Said:
        """Without signs, nothing."""
        if signs is None:
            none = torch.zeros(()), torch.zeros(())
            return cls(none, none, 0.0, 1.0)
        low = signs[1][judged, 0]
        centre, unit = float(low.mean()), float(low.std().clamp(min=1e-12))
        high, low = ((part[:, 0] - centre) / unit for part in signs)
        return cls((high, low), (signs[0][:, 1], signs[1][:, 1]), centre, unit)

    def added(
        self,
        harmful: Tensor,
        harmless: Tensor,
        unit: float,
        weights: tuple[float, float],
        parts: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Linear scores in units of ``unit`` with the weighted signs added; a harmless prompt has
        the highest score of its ``parts``, see ``fit_gate``."""
        h, s = (
            scores / unit + weights[0] * self.intent[n] + weights[1] * self.verdict[n]
            for n, scores in enumerate((harmful, harmless))
        )
        return h, _highest(s, parts)


def _highest(scores: Tensor, parts: Tensor | None) -> Tensor:
    """Scores (k,), each at least as high as those of its ``parts``, see ``fit_gate``."""
    if parts is None:
        return scores
    return scores.scatter_reduce(0, parts[:, 0], scores[parts[:, 1]], "amax")
