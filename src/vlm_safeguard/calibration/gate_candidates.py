"""Linear gates that calibration chooses from, fitted to labelled hidden states.

A candidate reads some layers and is the sum of one vector per layer. Its vectors are fitted to each
layer by itself (``by_layer``) or to all its layers together, with the largest margin (``margins``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from vlm_safeguard.calibration.stacked_states import StackedStates

Kind = Literal["first", "discriminant", "components", "margin"]

COMPONENTS = 320  # leading principal components that a gate may use
SHRINKAGE = 0.05  # of the within-class covariance towards a multiple of the identity
# Layers that a margin is fitted to: evenly spaced in these parts of the decoder, at most so many.
# The first sixth holds words rather than meaning.
SPANS = ((1 / 6, 1.0), (1 / 6, 2 / 3))
SPACED = 10
COSTS = (1.0, 3.0, 10.0, 30.0)  # of a prompt within the margin, relative to the margin's width
# Which of the states that are read of a text (``model.words.readings``) each have a machine of
# their own, whose scores are summed: the last one, its mean over the words, and the probe's.
SUMS = ((0,), (0, 1), (1, 2), (0, 1, 2))


@dataclass(frozen=True)
class LabelledStates:
    """Hidden states of harmful and harmless prompts, and their cross-validation folds.

    Attributes:
        harmful, harmless: (n, L, d) and (k, L, d), or of text with all that is read of it, one
            behind the other: up to (n, L, 3 d) and (k, L, 3 d), see ``model.words.readings``.
        harmful_fold, harmless_fold: (n,) and (k,); see ``gate_fitting.fit_gate``.
        directions: V_l by layer; their keys are the layers that a gate may read.
    """

    harmful: StackedStates
    harmless: StackedStates
    harmful_fold: Tensor
    harmless_fold: Tensor
    directions: dict[int, Tensor]

    @property
    def views(self) -> list[slice]:
        """Where the states at the last prompt token stand, and what else is read of a text."""
        width = next(iter(self.directions.values())).shape[1]
        return [slice(n, n + width) for n in range(0, self.harmful.width, width)]

    @property
    def folds(self) -> list[int]:
        """The folds that have both harmful and harmless prompts."""
        shared = set(self.harmful_fold.tolist()) & set(self.harmless_fold.tolist())
        return sorted(fold for fold in shared if fold >= 0)


@dataclass(frozen=True)
class Candidate:
    """A gate to compare with others.

    Attributes:
        layers: the layers it reads.
        tried: for each fold, scores (n,) and (k,) of all harmful and harmless prompts by the gate
            fitted without this fold.
        vectors: fits the gate to all prompts: one vector for each layer, (layers, d), or of the
            width of all that it reads, up to (layers, 3 d).
        cost: what it pays for prompts within its margin: the lower, the simpler it is.
    """

    layers: tuple[int, ...]
    tried: list[tuple[Tensor, Tensor]]
    vectors: Callable[[], Tensor]
    cost: float = 0.0


def candidates(kind: Kind, data: LabelledStates, pooled: bool = True) -> Iterator[Candidate]:
    """All gates of a kind: at single layers and, with ``pooled``, at several.

    - "first": the first safety direction of each layer,
    - "discriminant": the linear discriminant (shrunk, closed form) in each safety subspace,
    - "components": the linear discriminant in the leading principal components of the states,
    - "margin": the linear support vector machine over all its layers together.

    Raises:
        ValueError: the states are not finite.
    """
    return margins(data) if kind == "margin" else by_layer(kind, data, pooled)


def by_layer(kind: Kind, data: LabelledStates, pooled: bool) -> Iterator[Candidate]:
    """One vector fitted to each layer, alone and summed over runs of neighbouring layers."""
    depth, last = sorted(data.directions), data.views[0]
    bases, inner = {}, {}
    for n in depth:
        x, y = data.harmful.layer(n, last), data.harmless.layer(n, last)
        bases[n] = _basis(kind, x, y, data.directions[n])
        inner[n] = x.float() @ bases[n].T, y.float() @ bases[n].T
    tried = [
        _project(inner, data.harmful_fold != fold, data.harmless_fold != fold)
        for fold in data.folds
    ]
    choices: list[tuple[int, ...]] = [(layer,) for layer in depth]
    for width in (4, 8, 16) if pooled else ():
        choices += [tuple(depth[i : i + width]) for i in range(0, len(depth) - width + 1, 2)]

    def summed(layers: tuple[int, ...]) -> list[tuple[Tensor, Tensor]]:
        pairs = [[torch.stack([one[n][i] for n in layers]).sum(0) for i in (0, 1)] for one in tried]
        return [(h, s) for h, s in pairs]

    def vectors(layers: tuple[int, ...]) -> Tensor:
        return torch.stack([_discriminant(*inner[n]) @ bases[n] for n in layers])

    for layers in choices:
        yield Candidate(layers, summed(layers), partial(vectors, layers))


def margins(data: LabelledStates) -> Iterator[Candidate]:
    """Linear support vector machines over several layers together (Cortes & Vapnik, 1995).

    A sum of vectors that were each fitted to one layer counts what all layers know as often as
    there are layers. This one weighs the layers against each other. Both labels weigh the same. It
    is solved in its dual form: there are far fewer prompts than layers times dimensions.

    A kernel is large, so one is held at a time, and made again for the gate that is chosen. It is
    numpy's: where freed memory is kept (``utils.allocator``), torch's aligned blocks seldom fit in
    what was freed, and memory would grow with every copy.

    Where more is read of a text than its last state, there are also sums of machines, one for each
    of ``SUMS``. One machine for all finds less at low false-positive rates.

    Raises:
        ValueError: the states are not finite.
    """
    from sklearn.svm import SVC  # takes a second to import

    labels = np.arange(len(data.harmful) + len(data.harmless)) < len(data.harmful)
    fold = torch.cat([data.harmful_fold, data.harmless_fold])

    def fit(kernel: np.ndarray, known: np.ndarray, cost: float) -> SVC:
        machine = SVC(C=cost, kernel="precomputed", class_weight="balanced")
        return machine.fit(kernel, labels[known])

    def tried(layers: tuple[int, ...], view: slice) -> Tensor:
        """For each cost and fold, scores of all prompts by the machine fitted without this fold,
        (costs, folds, n + k)."""
        kernel = _kernel(data, layers, view)
        found = torch.empty(len(COSTS), len(data.folds), len(labels))
        for n, one in enumerate(data.folds):
            known = (fold != one).nonzero()[:, 0].numpy()
            part = kernel[np.ix_(known, known)]
            machines = [fit(part, known, cost) for cost in COSTS]
            del part  # each copy goes before the next is made
            part = kernel.take(known, 1)
            for scores, machine in zip(found[:, n], machines, strict=True):
                scores.copy_(torch.from_numpy(machine.decision_function(part)))
            del part
        return found

    def vectors(layers: tuple[int, ...], chosen: Sequence[int], cost: float) -> Tensor:
        found = []
        for number, view in enumerate(data.views[: max(chosen) + 1]):
            if number not in chosen:
                found.append(torch.zeros(len(layers), view.stop - view.start))
                continue
            machine = fit(_kernel(data, layers, view), np.arange(len(labels)), cost)
            weights = torch.zeros(len(labels))
            weights[machine.support_] = torch.from_numpy(machine.dual_coef_[0]).float()
            states = (_standard(data, n, view) for n in layers)
            parts = [(weights @ z) / spread for z, spread in states]
            found.append(torch.stack(parts) / (len(layers) * len(parts[0])))
        return torch.cat(found, 1)

    for layers in dict.fromkeys(_spaced(sorted(data.directions), *span) for span in SPANS):
        by_view = [tried(layers, view) for view in data.views]
        for cost, *found in zip(COSTS, *by_view, strict=True):
            for chosen in SUMS:
                if max(chosen) < len(found):
                    summed = torch.stack([found[view] for view in chosen]).sum(0)
                    pairs = [(one[: len(data.harmful)], one[len(data.harmful) :]) for one in summed]
                    yield Candidate(layers, pairs, partial(vectors, layers, chosen, cost), cost)


def _spaced(depth: Sequence[int], first: float, last: float) -> tuple[int, ...]:
    """At most ``SPACED`` evenly spaced layers between two shares of the depth."""
    part = depth[int(first * len(depth)) : max(1, round(last * len(depth)))]
    return tuple(part[:: math.ceil(len(part) / SPACED)])


def _standard(data: LabelledStates, layer: int, view: slice) -> tuple[Tensor, Tensor]:
    """States (n + k, d) of a layer, every dimension with mean 0 and spread 1, and the spreads (d,).
    Without this a few dimensions with huge values, which LLMs have, would decide."""
    states = torch.cat([part.layer(layer, view) for part in (data.harmful, data.harmless)]).float()
    spread = states.std(0).clamp(min=1e-6)
    return states.sub_(states.mean(0)).div_(spread), spread


def _kernel(data: LabelledStates, layers: tuple[int, ...], view: slice) -> np.ndarray:
    """Inner products (n + k, n + k), float64, of the standardised states at all layers, about 1 on
    the diagonal."""
    count = len(data.harmful) + len(data.harmless)
    kernel = np.zeros((count, count))
    for layer in layers:
        z, _ = _standard(data, layer, view)
        kernel += (z @ z.T).numpy()
    if not np.isfinite(kernel.sum()):  # NaN and Inf show in the sum, which takes no memory
        raise ValueError("no gate can be judged: the states are not finite")
    kernel /= len(layers) * (view.stop - view.start)
    return kernel


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
