"""Fits the gates of a guard, and chooses their thresholds and which of them to keep.

- "text" reads the text-only pass: what harm looks like, and whether the LLM would refuse the text
  (the verdict). The verdict alone would stop harmless questions about a picture, which the LLM
  refuses because it sees none.
- "vlm" reads the request's own pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from vlm_safeguard.calibration.attack_trials import answered
from vlm_safeguard.calibration.budget import Budget
from vlm_safeguard.calibration.conformal import conformal_threshold
from vlm_safeguard.calibration.gate_candidates import Kind
from vlm_safeguard.calibration.gate_fitting import (
    INTENT,
    INTENT_AND_VERDICT,
    KINDS,
    GateFit,
    GateName,
    Weights,
    fit_gate,
)
from vlm_safeguard.calibration.hidden_states import record_readings, record_signs
from vlm_safeguard.calibration.recognition import BY_PHRASES, Recogniser
from vlm_safeguard.calibration.recorded_states import Recorded
from vlm_safeguard.data.inputs import PICTURED, query, settings_of, spoken
from vlm_safeguard.data.prompts import Prompt
from vlm_safeguard.model.canonical_text import canonical_text
from vlm_safeguard.model.loading import LoadedModel
from vlm_safeguard.model.words import find_frame
from vlm_safeguard.utils.progress import Progress

IN_VLM_SHARE = 0.1  # of the false-positive budget
IN_VLM_DEPTH = 2 / 3  # of the decoder, that the gate in the VLM may read
# What the verdict may add to the score of the text gate, in units of its spread.
VERDICTS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 4.0)
# Share of the harmful requests which the LLM refuses as text that must open a gate, so that it also
# refuses them beside a picture; and how many of them it takes to tell.
KEPT, REFUSED_LEAST = 0.98, 10
# The model is asked the highest threshold-setting prompts: this many times those that a gate may
# open for.
ASKED = 3


@dataclass(frozen=True)
class FittedGates:
    """Gates to choose from: the text gate with each weight of the verdict, and that in the VLM."""

    texts: list[GateFit]
    vlm: GateFit


def fit_gates(recorded: Recorded, budget: Budget) -> FittedGates:
    """Fit the text gate, with several weights of the verdict where there is one, and the gate in
    the VLM.

    The text gate gets 90% of the false-positive budget, because it finds nearly all harmful
    requests.
    """
    epsilon = budget.false_positives
    text = fit_to(recorded, "text", epsilon * (1 - IN_VLM_SHARE), weights=INTENT)
    texts = [text]
    if recorded.openings:
        texts += [text.heeding(weight, recorded.openings) for weight in VERDICTS[1:]]
    return FittedGates(texts, fit_to(recorded, "vlm", epsilon * IN_VLM_SHARE))


def fit_to(
    recorded: Recorded,
    source: Literal["text", "vlm"],
    budget: float,
    *,
    kinds: Sequence[Kind] = KINDS,
    pooled: bool = True,
    intent: bool = True,
    weights: Weights = INTENT_AND_VERDICT,
) -> GateFit:
    """``fit_gate`` to what was recorded, as text or with pictures; ``intent``: whether it may read
    refusal signs."""
    directions, parts = recorded.directions, None
    if source == "text":
        states, parts = recorded.text_only_states(), recorded.parts()
    else:
        states = recorded.vlm_states()
        # The last prompt token is steered above the last layer of this gate only.
        last = max(1, int(IN_VLM_DEPTH * len(directions)))
        directions = {n: found for n, found in directions.items() if n < last}
    return fit_gate(
        *states.split(),
        *states.folds(),
        directions,
        budget,
        kinds=kinds,
        pooled=pooled,
        counted=states.split_counted(),
        signs=states.split_signs() if intent else None,
        weights=weights,
        openings=recorded.openings,
        parts=parts,
    )


def bound_scores(
    loaded: LoadedModel,
    fits: FittedGates,
    items: Sequence[Prompt],
    reads_pictures: bool,
    reads_sentences: bool,
    epsilon: float,
    folder: Path,
    progress: Progress,
    recogniser: Recogniser = BY_PHRASES,
) -> Tensor:
    """Scores of harmless questions, which set the thresholds: the highest of each gate.

    Each prompt is scored as text and with its picture, or with a blank and a drawn one in turn. A
    question and its copies in templates count as one, so that scores are independent. If the model
    refuses a prompt by itself, no gate stops it, so it gets the lowest score.

    Args:
        fits: the gates.
        items: harmless prompts that no gate was fitted to.
        reads_pictures: whether text gates also read the words in pictures.
        reads_sentences: whether text gates also read each sentence by itself.
        epsilon: the false-positive rate that thresholds are set for.

    Returns:
        Scores (k, n) of k questions by the text gates and by the gate in the VLM, which comes
        last, each in units of its ``spread``.
    """
    said = [spoken(p, reads_pictures) for p in items]
    settings = [tuple(s for s in PICTURED if s in settings_of(p)) for p in items]
    mixed = [query(p, s[n % len(s)]) for n, (p, s) in enumerate(zip(items, settings, strict=True))]
    layers = 1 + max(fits.vlm.layers)  # no gate that sees pictures reads a layer above
    openings = next((fit.openings for fit in fits.texts if fit.openings), ())
    frame = find_frame(loaded)
    text, signs = record_signs(loaded, said, openings, folder, "bound, text", progress, frame=frame)
    what = "bound, pictures"
    seen, _ = record_signs(loaded, mixed, (), folder, what, progress, layers=layers)
    texts = [one.text for one in said]
    others = record_readings(loaded, texts, reads_sentences, openings, frame, folder, progress)
    owner, place = others.of.T
    own, verdicts = _by_reading(signs, texts, owner)
    # The text gates differ in the weight of the verdict alone.
    of_others = fits.texts[0].scores(others.states, others.signs)[place]
    columns = []
    for fit in fits.texts:
        of_these = of_others + fit.weights[1] * verdicts
        of_prompts = fit.scores(text, own).scatter_reduce(0, owner, of_these, "amax")
        columns.append(of_prompts / fit.spread)
    in_vlm = torch.maximum(fits.vlm.scores(text), fits.vlm.scores(seen))
    scores = torch.stack([*columns, in_vlm / fits.vlm.spread], 1)
    _lower_refused(loaded, items, scores, ASKED * epsilon, recogniser)
    highest: dict[str, Tensor] = {}
    for prompt, score in zip(items, scores, strict=True):
        highest[prompt.cluster] = torch.maximum(score, highest.get(prompt.cluster, score))
    return torch.stack(list(highest.values()))


def _by_reading(
    signs: Tensor | None, texts: Sequence[str], owner: Tensor
) -> tuple[Tensor | None, Tensor]:
    """The signs (n, 2) of prompts as they stand, and the verdicts (m,) of their other readings, as
    at runtime: of a text in odd characters the canonical form has the verdict.

    Args:
        signs: of the prompts; the verdict is that of the canonical form.
        owner: the prompt of each reading, see ``Readings``.
    """
    if signs is None:
        return None, torch.zeros(len(owner))
    odd = torch.tensor([canonical_text(text) != text for text in texts])
    first = torch.ones_like(owner, dtype=torch.bool)
    first[1:] = owner[1:] != owner[:-1]  # a canonical form comes before sentences
    own = torch.stack([signs[:, 0], signs[:, 1] * ~odd], 1)
    return own, signs[owner, 1] * (odd[owner] & first)


def _lower_refused(
    loaded: LoadedModel,
    items: Sequence[Prompt],
    scores: Tensor,
    share: float,
    recogniser: Recogniser,
) -> None:
    """Give the lowest score to what the model refuses by itself, from the highest score down until
    it answers the highest ``share`` by each gate. Only these decide where a threshold lies."""
    count, lowest, known = int(share * len(items)) + 1, scores.min(0).values, set[int]()
    while True:
        top = {n for column in scores.T for n in column.argsort(descending=True)[:count].tolist()}
        new = sorted(top - known)
        if not new:
            return
        known |= top
        said = answered(loaded, [items[n] for n in new], recogniser)
        scores[[n for n, is_answered in zip(new, said, strict=True) if not is_answered]] = lowest


def useful_gates(
    fits: FittedGates, scores: Tensor, epsilon: float, harmful: Tensor
) -> dict[GateName, GateFit]:
    """The gates of a guard with their final thresholds: the text gate, and that in the VLM if it
    helps.

    What the LLM refuses as text should be refused beside a picture too. So the verdict gets a
    weight with which a share ``KEPT`` of such harmful requests opens the text gate; if there is
    none, one with which most do. Among these weights, with and without the gate in the VLM, the
    gates are taken that find most harmful requests with a picture.

    Thresholds move until the false-positive rate of all gates is within a bound: each by the same
    number of ``spread`` units of its gate. ``spread`` is cross-validated, because an overfitted
    gate scores unseen prompts far more widely than those it was fitted to, and would otherwise
    raise the thresholds of the other gates too.

    Gates share one false-positive budget, so the verdict and another gate raise the threshold for
    all other requests: no more is taken of them than helps.

    Args:
        fits: the fitted gates.
        scores: the highest score of each gate for each harmless question, (k, n), as in
            ``bound_scores``. No gate was fitted to these questions.
        epsilon: highest rate of harmless requests on which any gate opens, with the confidence of
            ``conformal.CONFIDENCE``.
        harmful: cross-validated scores (m, n) of the same harmful requests by each gate, as in
            ``GateFit.unseen``.
    """
    in_vlm, best = len(fits.texts), (-1.0, -1)
    chosen: dict[GateName, GateFit] = {}
    for place, text in enumerate(fits.texts):
        for columns in ([place], [place, in_vlm]):
            cut = conformal_threshold(scores[:, columns].max(1).values, epsilon)
            found = int((harmful[:, columns].max(1).values > cut).sum())
            rank = min(_refused_kept(text, cut), KEPT), found
            if rank > best:
                best = rank
                chosen = {"text": text.moved(cut)}
                if in_vlm in columns:
                    chosen["vlm"] = fits.vlm.moved(cut)
    return chosen


def _refused_kept(text: GateFit, cut: float) -> float:
    """The share of the harmful requests that the LLM refuses as text on which the text gate opens,
    cross-validated, with its threshold moved by ``cut``; 1 if they are too few to tell."""
    if text.verdicts is None:
        return 1.0
    refused = text.verdicts[0] > 0
    if int(refused.sum()) < REFUSED_LEAST:
        return 1.0
    return float((text.unseen[0][refused] > cut).double().mean())
