"""Fits gates in closed form and measures how well their scores separate harmful from harmless."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from vlm_safeguard.calibration.conformal import conformal_threshold
from vlm_safeguard.runtime.gate import LinearGate

Kind = Literal["first", "discriminant", "components"]
KINDS: tuple[Kind, ...] = ("first", "discriminant", "components")
COMPONENTS = 320  # leading principal components that a gate may use
SHRINKAGE = 0.05  # of the within-class covariance towards a multiple of the identity


def auc(harmful: Tensor, harmless: Tensor) -> float:
    """Area under the ROC curve of scores (n,) and (k,): P(harmful > harmless), ties half."""
    from sklearn.metrics import roc_auc_score  # takes a second to import

    labels = [True] * len(harmful) + [False] * len(harmless)
    return float(roc_auc_score(labels, torch.cat([harmful, harmless]).double().numpy()))


def threshold(harmful: Tensor, harmless: Tensor, budget: float) -> float:
    """A threshold whose false-positive rate on ``harmless`` is at most ``budget``.

    Where the two can be told apart with room to spare it lies in the middle of the gap between
    the harmless scores' upper and the harmful scores' lower end (so that unseen prompts on either
    side find room), otherwise right above the budgeted quantile.
    """
    ranked = harmless.sort(descending=True).values
    allowed = int(budget * len(ranked))
    lowest = ranked[min(allowed, len(ranked) - 1)]
    missed = harmful.sort().values[int(0.01 * len(harmful))]
    return float((lowest + missed) / 2 if missed > lowest else lowest)


@dataclass(frozen=True)
class GateFit:
    """A linear gate over some layers: score = sum of ``h_l . vectors_l`` minus ``threshold``."""

    layers: tuple[int, ...]
    vectors: Tensor  # (n, d)
    threshold: float
    spread: float = 1.0  # standard deviation of harmless scores, cross-validated: see `bounded`
    # Scores of harmful and harmless prompts by vectors that were not fitted to them, less the
    # threshold, in spreads: cross-validated.
    unseen: tuple[Tensor, Tensor] = (torch.empty(0), torch.empty(0))

    @property
    def unseen_rates(self) -> tuple[float, float]:
        """True- and false-positive rate on prompts that the vectors were not fitted to."""
        harmful, harmless = ((scores > 0).double().mean().item() for scores in self.unseen)
        return harmful, harmless

    def scores(self, states: Tensor) -> Tensor:
        """Scores (k,) of states (k, L, d); positive opens the gate."""
        gate = LinearGate(self.vectors, torch.zeros(len(self.layers)))
        return gate.scores(states[:, list(self.layers)]).sum(1) - self.threshold


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
) -> GateFit:
    """The gate with the best true-positive rate within the false-positive budget.

    Candidates: the first safety direction of each layer; the linear discriminant (shrunk, closed
    form) inside its safety subspace; and the one inside the leading principal components of the
    prompts' states. Each alone, and pooled over runs of neighbouring layers.

    All are judged, and the threshold of the best is set, by cross-validation: on prompts that its
    vectors have not seen, because on those that they were fitted to both classes look further
    apart than they are.

    Args:
        harmful, harmless: states (k, L, d) of calibration prompts.
        harmful_fold, harmless_fold: number of the fold of each, (k,); copies of a question share
            it. Those of a negative fold teach the vectors and are never judged by.
        directions: V_l by layer.
        kinds: which candidates are tried. pooled: also over runs of layers.
    """
    shared = set(harmful_fold.tolist()) & set(harmless_fold.tolist())
    folds = sorted(fold for fold in shared if fold >= 0)
    depth = sorted(directions)
    choices: list[tuple[int, ...]] = [(layer,) for layer in depth]
    for width in (4, 8, 16) if pooled else ():
        choices += [tuple(depth[i : i + width]) for i in range(0, len(depth) - width + 1, 2)]
    best: GateFit | None = None
    best_value = -1.0
    for kind in kinds:
        bases = {n: _basis(kind, harmful[:, n], harmless[:, n], directions[n]) for n in depth}
        inner = {
            n: (harmful[:, n].float() @ b.T, harmless[:, n].float() @ b.T) for n, b in bases.items()
        }
        parts = [_project(inner, harmful_fold != fold, harmless_fold != fold) for fold in folds]
        for layers in choices:
            unseen_harmful, unseen_harmless = [], []
            for fold, scores in zip(folds, parts, strict=True):
                h, s = (torch.stack([scores[n][i] for n in layers]).sum(0) for i in (0, 1))
                known = s[(harmless_fold != fold) & (harmless_fold >= 0)]
                centre, spread = known.mean(), known.std().clamp(min=1e-12)
                unseen_harmful.append((h[harmful_fold == fold] - centre) / spread)
                unseen_harmless.append((s[harmless_fold == fold] - centre) / spread)
            h, s = torch.cat(unseen_harmful), torch.cat(unseen_harmless)
            cut = threshold(h, s, budget)
            value = (h > cut).double().mean().item() + 0.1 * auc(h, s)  # AUC breaks ties
            if value > best_value:
                vectors = torch.stack([_discriminant(*inner[n]) @ bases[n] for n in layers])
                best_value = value
                unit = float(s.std().clamp(min=1e-12))
                margins = (h - cut) / unit, (s - cut) / unit
                best = GateFit(layers, vectors, cut, unit, margins)
    if best is None:
        raise ValueError("no gate can be judged: scores of the states are not finite")
    # Cut and spread were found in units of the spread of the harmless scores that vectors were
    # fitted on; the final vectors have their own.
    seen = replace(best, threshold=0.0).scores(harmless[harmless_fold >= 0])
    scale = float(seen.std())
    cut = float(seen.mean()) + best.threshold * scale
    return replace(best, threshold=cut, spread=best.spread * scale)


def bounded(gates: Sequence[GateFit], scores: Tensor, epsilon: float) -> tuple[GateFit, ...]:
    """The gates with their thresholds moved together until the request's false-positive rate, by
    whichever gate, is at most ``epsilon`` with the confidence of ``conformal.CONFIDENCE``.

    Each moves in units of the spread of its scores on prompts that it was not fitted on: an
    overfitted gate scores those many times wider than its own, and would, measured by what it was
    fitted on, drag the threshold of the other up with its own.

    Args:
        scores: the highest score of each harmless question by any of the gates, in units of the
            gate's spread, (n,); none of the questions was fitted on.
    """
    shift = conformal_threshold(scores, epsilon)
    return tuple(
        replace(
            gate,
            threshold=gate.threshold + shift * gate.spread,
            unseen=(gate.unseen[0] - shift, gate.unseen[1] - shift),
        )
        for gate in gates
    )


def _project(
    inner: dict[int, tuple[Tensor, Tensor]], harmful: Tensor, harmless: Tensor
) -> dict[int, tuple[Tensor, Tensor]]:
    """Per layer the scores of all prompts by the discriminant fitted on the given ones."""
    found = {}
    for layer, (x, y) in inner.items():
        vector = _discriminant(x[harmful], y[harmless])
        found[layer] = (x @ vector, y @ vector)
    return found


def _basis(kind: Kind, harmful: Tensor, harmless: Tensor, directions: Tensor) -> Tensor:
    """Rows (r, d) of the subspace in which one layer's gate vector is looked for."""
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
