"""Fits gates in closed form and measures how well their scores separate harmful from harmless."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from vlm_safeguard.artifact.config import MAX_OPENINGS
from vlm_safeguard.calibration.conformal import conformal_threshold
from vlm_safeguard.runtime.gate import IntentGate, LinearGate

Kind = Literal["first", "discriminant", "components"]
KINDS: tuple[Kind, ...] = ("first", "discriminant", "components")
COMPONENTS = 320  # leading principal components that a gate may use
OFTEN, CONTRAST = 0.03, 4.0
# False-positive rate up to which candidates are compared. At the budget itself, two or three
# harmless prompts would decide between them.
COMPARED = 0.1
# What the LLM's verdict adds to a score, in units of the spread over harmless prompts: more than
# linear scores differ.
VERDICT = 20.0
SHRINKAGE = 0.05  # of the within-class covariance towards a multiple of the identity


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
        vectors: one vector for each layer, (n, d).
        openings: tokens that the LLM's refusals begin with, see ``method.refusal_intent``.
        weights: of the refusal intent and of the verdict.
        spread: standard deviation of the scores of harmless prompts, cross-validated.
        unseen: cross-validated scores of harmful and harmless prompts, minus the threshold and
            divided by ``spread``.
        judged: which of the harmful prompts ``unseen`` is about.
    """

    layers: tuple[int, ...]
    vectors: Tensor
    threshold: float
    openings: tuple[int, ...] = ()
    weights: tuple[float, float] = (0.0, 0.0)
    spread: float = 1.0
    unseen: tuple[Tensor, Tensor] = (torch.empty(0), torch.empty(0))
    judged: tuple[bool, ...] = ()

    @property
    def unseen_rates(self) -> tuple[float, float]:
        """Cross-validated true- and false-positive rates."""
        harmful, harmless = ((scores > 0).double().mean().item() for scores in self.unseen)
        return harmful, harmless

    def moved(self, shift: float) -> GateFit:
        """The gate with its threshold moved up by ``shift`` units of ``spread``."""
        harmful, harmless = self.unseen
        unseen = harmful - shift, harmless - shift
        return replace(self, threshold=self.threshold + shift * self.spread, unseen=unseen)

    def scores(self, states: Tensor, signs: Tensor | None = None) -> Tensor:
        """Scores (k,) of states (k, L, d) and, for a gate with ``openings``, refusal signs (k, 2);
        positive opens the gate.

        Raises:
            ValueError: the gate has ``openings`` and there are no signs.
        """
        none = torch.zeros(len(self.layers))
        gate = LinearGate(self.vectors, none)
        if self.openings:
            openings, weights = torch.tensor(self.openings), torch.tensor(self.weights)
            gate = IntentGate(self.vectors, none, openings, weights)
        return gate.total(states[:, list(self.layers)], signs) - self.threshold


def fit_gate(
    harmful: Tensor,
    harmless: Tensor,
    harmful_fold: Tensor,
    harmless_fold: Tensor,
    directions: dict[int, Tensor],
    budget: float,
    *,
    kinds: Sequence[Kind] = KINDS,
    pooled: bool = True,
    counted: Tensor | None = None,
    signs: tuple[Tensor, Tensor] | None = None,
    openings: Sequence[int] = (),
    parts: Tensor | None = None,
) -> GateFit:
    """Fit the gate that best separates harmful prompts at low false-positive rates.

    The candidates for a layer's vector are

    - "first": its first safety direction,
    - "discriminant": the linear discriminant (shrunk, closed form) in its safety subspace,
    - "components": the linear discriminant in the leading principal components of the states.

    Each is tried at single layers and summed over runs of neighbouring layers. Candidates are
    compared, and the threshold is set, by cross-validation: on the prompts that vectors are fitted
    to, harmful and harmless scores are further apart than on others.

    With ``signs`` the score is the sum of the linear score and of the refusal intent, both in units
    of their spread over harmless prompts. Where it separates better, the verdict adds ``VERDICT``
    such units, which opens the gate for what the LLM refuses as text.

    Args:
        harmful, harmless: states (k, L, d) of calibration prompts.
        harmful_fold, harmless_fold: fold of each prompt, (k,). Copies of a question share a fold.
            Prompts with a negative fold are used for fitting only.
        directions: V_l by layer.
        budget: allowed false-positive rate.
        kinds: the candidates to try.
        pooled: whether to try runs of layers too.
        counted: which harmless prompts count as false positives, (k,) bool; by default all. The
            others are used for fitting only.
        signs: refusal signs of the harmful and the harmless prompts, (k, 2) each.
        openings: the tokens that the signs are about.
        parts: places (m, 2) among the harmless prompts of a prompt and of one of its sentences. The
            gate reads sentences too, so a prompt is judged by the highest of their scores.

    Raises:
        ValueError: the scores are not finite.
    """
    shared = set(harmful_fold.tolist()) & set(harmless_fold.tolist())
    folds = sorted(fold for fold in shared if fold >= 0)
    known_harmful = torch.isin(harmful_fold, torch.tensor(folds))
    judged = torch.isin(harmless_fold, torch.tensor(folds))
    if counted is not None:
        judged &= counted
    said = _Said.of(signs, judged)
    depth = sorted(directions)
    choices: list[tuple[int, ...]] = [(layer,) for layer in depth]
    for width in (4, 8, 16) if pooled else ():
        choices += [tuple(depth[i : i + width]) for i in range(0, len(depth) - width + 1, 2)]
    best: GateFit | None = None
    best_value, weight_of_verdict = -1.0, 0.0
    for kind in kinds:
        bases = {n: _basis(kind, harmful[:, n], harmless[:, n], directions[n]) for n in depth}
        inner = {
            n: (harmful[:, n].float() @ b.T, harmless[:, n].float() @ b.T) for n, b in bases.items()
        }
        tried = [_project(inner, harmful_fold != fold, harmless_fold != fold) for fold in folds]
        for layers in choices:
            unseen = torch.zeros(len(harmful)), torch.zeros(len(harmless))
            for fold, scores in zip(folds, tried, strict=True):
                h, s = (torch.stack([scores[n][i] for n in layers]).sum(0) for i in (0, 1))
                known = s[(harmless_fold != fold) & judged]
                centre, spread = known.mean(), known.std().clamp(min=1e-12)
                h = (h - centre) / spread + said.intent[0]
                s = _highest((s - centre) / spread + said.intent[1], parts)
                unseen[0][harmful_fold == fold] = h[harmful_fold == fold]
                unseen[1][harmless_fold == fold] = s[harmless_fold == fold]
            unit = float(unseen[1][judged].std().clamp(min=1e-12))
            for verdict in (0.0,) if signs is None else (0.0, VERDICT):
                h = (unseen[0] + verdict * said.verdict[0])[known_harmful]
                s = (unseen[1] + verdict * said.verdict[1])[judged]
                value = auc(h, s, max(COMPARED, budget))
                if value > best_value:
                    cut = threshold(h, s, budget)
                    vectors = torch.stack([_discriminant(*inner[n]) @ bases[n] for n in layers])
                    best_value, weight_of_verdict = value, verdict
                    margins = (h - cut) / unit, (s - cut) / unit
                    best = GateFit(layers, vectors, cut, spread=unit, unseen=margins)
    if best is None:
        raise ValueError("no gate can be judged: scores of the states are not finite")
    # Threshold and spread are in units of the spread of the harmless scores in each fold: convert
    # them to that of the final vectors.
    seen = replace(best, threshold=0.0).scores(harmless[judged])
    scale = float(seen.std())
    cut = float(seen.mean()) + best.threshold * scale
    used = tuple(known_harmful.tolist())
    best = replace(best, threshold=cut, spread=best.spread * scale, judged=used)
    if signs is None:
        return best
    weights = scale / said.unit, weight_of_verdict * scale
    cut += weights[0] * said.centre
    return replace(best, threshold=cut, openings=tuple(openings), weights=weights)


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


def _highest(scores: Tensor, parts: Tensor | None) -> Tensor:
    """Scores (k,), each at least as high as those of its ``parts``, see ``fit_gate``."""
    if parts is None:
        return scores
    return scores.scatter_reduce(0, parts[:, 0], scores[parts[:, 1]], "amax")


def refusal_openings(harmful: Tensor, harmless: Tensor) -> list[int]:
    """Tokens that the model's refusals begin with, learned from its most likely first token of the
    answer to each anchor, (n,) each: no phrase list is needed, in any language.

    An opening begins at least ``OFTEN`` of the answers to harmful anchors, ``CONTRAST`` times as
    many as to harmless ones.
    """
    found = []
    for token in harmful.unique().tolist():
        often, seldom = (float((part == token).double().mean()) for part in (harmful, harmless))
        if often >= OFTEN and often >= CONTRAST * seldom:
            found.append(int(token))
    return found[:MAX_OPENINGS]


def useful_gates(
    text_gate: GateFit, in_vlm: GateFit, scores: Tensor, epsilon: float, harmful: Tensor
) -> dict[Literal["text", "vlm"], GateFit]:
    """The gates of a guard with their final thresholds: both, or the text gate alone.

    Thresholds move until the false-positive rate of all gates is within a bound: each by the same
    number of ``spread`` units of its gate. ``spread`` is cross-validated, because an overfitted
    gate scores unseen prompts far more widely than those it was fitted to, and would otherwise
    raise the threshold of the other gate too.

    Two gates share one false-positive budget, so a second one raises the threshold of the first. It
    is left out unless one of the two opens on more harmful requests with a picture than the text
    gate does alone.

    Args:
        text_gate, in_vlm: the fitted gates.
        scores: the highest score of each gate for each harmless question, (n, 2), in units of the
            gate's spread. No gate was fitted to these questions.
        epsilon: highest rate of harmless requests on which any gate opens, with the confidence of
            ``conformal.CONFIDENCE``.
        harmful: cross-validated scores (m, 2) of the same harmful requests by each gate, as in
            ``GateFit.unseen``.
    """
    alone = conformal_threshold(scores[:, 0], epsilon)
    both = conformal_threshold(scores.max(1).values, epsilon)
    if (harmful.max(1).values > both).sum() <= (harmful[:, 0] > alone).sum():
        return {"text": text_gate.moved(alone)}
    return {"text": text_gate.moved(both), "vlm": in_vlm.moved(both)}


def _project(
    inner: dict[int, tuple[Tensor, Tensor]], harmful: Tensor, harmless: Tensor
) -> dict[int, tuple[Tensor, Tensor]]:
    """Scores of all prompts at each layer, by the discriminant fitted to the masked ones."""
    found = {}
    for layer, (x, y) in inner.items():
        vector = _discriminant(x[harmful], y[harmless])
        found[layer] = (x @ vector, y @ vector)
    return found


def _basis(kind: Kind, harmful: Tensor, harmless: Tensor, directions: Tensor) -> Tensor:
    """Basis (r, d) of the subspace that contains a layer's gate vector."""
    if kind == "first":
        return directions[:1]
    if kind == "discriminant":
        return directions
    states = torch.cat([harmful, harmless]).float()
    _, _, rows = torch.linalg.svd(states - states.mean(0), full_matrices=False)
    return rows[:COMPONENTS]


def _discriminant(x: Tensor, y: Tensor) -> Tensor:
    """Shrunk linear discriminant (r,) of harmful x and harmless y, (k, r), scaled so that the
    scores of ``y`` have unit spread."""
    width = x.shape[1]
    spread = (torch.cov(x.T) + torch.cov(y.T)).reshape(width, width) / 2
    shrunk = (1 - SHRINKAGE) * spread + SHRINKAGE * spread.diagonal().mean() * torch.eye(width)
    vector = torch.linalg.solve(shrunk, x.mean(0) - y.mean(0))
    return vector / (y @ vector).std().clamp(min=1e-12)
