"""How well a score separates harmful from harmless, and gates fitted in closed form."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


def auc(harmful: Tensor, harmless: Tensor) -> float:
    """Area under the ROC curve of scores (n,) and (k,): P(harmful > harmless), ties half."""
    pairs = harmful[:, None] - harmless[None, :]
    return ((pairs > 0).double() + 0.5 * (pairs == 0).double()).mean().item()


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

    def scores(self, states: Tensor) -> Tensor:
        """Scores (k,) of states (k, L, d); positive opens the gate."""
        chosen = states[:, list(self.layers)].float()
        return torch.einsum("knd,nd->k", chosen, self.vectors) - self.threshold


def fit_gate(
    harmful: Tensor,
    harmless: Tensor,
    harmful_fold: Tensor,
    harmless_fold: Tensor,
    directions: dict[int, Tensor],
    budget: float,
) -> GateFit:
    """The gate with the best true-positive rate within the false-positive budget.

    Candidates: the first safety direction of each layer alone; and, for each layer, the linear
    discriminant inside its safety subspace (shrunk, closed form), alone and pooled over runs of
    neighbouring layers. Judged by two-fold cross-validation, so that the richer candidates win
    only where they generalise.

    Args:
        harmful, harmless: states (k, L, d) of calibration prompts.
        harmful_fold, harmless_fold: 0 or 1 for each of them, (k,); copies of a question share it.
        directions: V_l by layer.
    """
    folds = [(harmful_fold == n, harmless_fold == n) for n in (0, 1)]
    best: tuple[float, str, tuple[int, ...]] = (-1.0, "", ())
    depth = sorted(directions)
    runs = [(layer,) for layer in depth]
    wide = [tuple(depth[i : i + w]) for w in (4, 8) for i in range(0, len(depth) - w + 1, 2)]
    for kind, choices in (("first", runs + wide), ("discriminant", runs + wide)):
        weights = [
            {n: _vector(kind, harmful[a, n], harmless[b, n], directions[n]) for n in depth}
            for a, b in folds
        ]
        projected = [
            (
                {n: harmful[:, n].float() @ w[n] for n in depth},
                {n: harmless[:, n].float() @ w[n] for n in depth},
            )
            for w in weights
        ]
        for layers in choices:
            value = 0.0
            for (a, b), (good, fine) in zip(folds, projected, strict=True):  # a, b: fitted on
                h = torch.stack([good[n] for n in layers]).sum(0)
                s = torch.stack([fine[n] for n in layers]).sum(0)
                cut = threshold(h[a], s[b], budget)
                tpr, fpr = (h[~a] > cut).double().mean(), (s[~b] > cut).double().mean()
                # Past the budget a false positive costs ten missed attacks; AUC breaks ties.
                value += float(tpr) - 10 * max(0.0, float(fpr) - budget) + 0.1 * auc(h[~a], s[~b])
            if value > best[0]:
                best = (value, kind, layers)
    _, kind, layers = best
    vectors = torch.stack(
        [_vector(kind, harmful[:, n], harmless[:, n], directions[n]) for n in layers]
    )
    fit = GateFit(layers, vectors, 0.0)
    cut = threshold(fit.scores(harmful), fit.scores(harmless), budget)
    return GateFit(layers, vectors, cut)


def _vector(kind: str, harmful: Tensor, harmless: Tensor, rows: Tensor) -> Tensor:
    """One layer's gate vector (d,), scaled so that harmless scores have unit spread."""
    if kind == "first":
        vector = rows[0].clone()
    else:
        x, y = harmful.float() @ rows.T, harmless.float() @ rows.T
        spread = (torch.cov(x.T) + torch.cov(y.T)).reshape(len(rows), len(rows)) / 2
        shrunk = 0.8 * spread + 0.2 * spread.diagonal().mean() * torch.eye(len(rows))
        vector = torch.linalg.solve(shrunk, x.mean(0) - y.mean(0)) @ rows
    return vector / (harmless.float() @ vector).std().clamp(min=1e-12)
