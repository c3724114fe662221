"""Fits the gates of a guard, and chooses their thresholds and which of them to keep.

- "text" reads the text-only pass: what harm looks like.
- "refused" reads it too, and opens only where the verdict says that the LLM would refuse the text.
  The verdict alone would stop harmless questions about a picture, which the LLM refuses because it
  sees none.
- "vlm" reads the request's own pass.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
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
    VERDICT_ALONE,
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
from vlm_safeguard.model.loading import LoadedModel
from vlm_safeguard.model.words import find_frame
from vlm_safeguard.utils.progress import Progress

IN_VLM_SHARE = 0.1  # of the false-positive budget
IN_VLM_DEPTH = 2 / 3  # of the decoder, that the gate in the VLM may read
# Of the harmless questions about a picture that the LLM would refuse as text, that the gate on
# refused texts may open for; and how many of them it needs.
REFUSED_SHARE, REFUSED_LEAST = 0.05, 10
# The model is asked the highest threshold-setting prompts: this many times those that a gate may
# open for.
ASKED = 3


def fit_gates(recorded: Recorded, budget: Budget) -> dict[GateName, GateFit]:
    """Fit the text gate, the gate on refused texts if there is enough to fit it to, and the gate in
    the VLM.

    The text gate gets 90% of the false-positive budget, because it finds nearly all harmful
    requests.
    """
    epsilon = budget.false_positives
    refused = _refused(recorded)
    weights = INTENT_AND_VERDICT if refused is None else INTENT
    fits: dict[GateName, GateFit] = {
        "text": fit_to(recorded, "text", epsilon * (1 - IN_VLM_SHARE), weights=weights)
    }
    if refused is not None:
        fits["refused"] = refused
    return fits | {"vlm": fit_to(recorded, "vlm", epsilon * IN_VLM_SHARE)}


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


def _refused(recorded: Recorded) -> GateFit | None:
    """The gate on refused texts, or None where too few texts are refused to judge it by."""
    states = recorded.refused_states()
    if states is None or min(int(one.sum()) for one in states.split_counted()) < REFUSED_LEAST:
        return None
    return fit_gate(
        *states.split(),
        *states.folds(),
        recorded.directions,
        REFUSED_SHARE,
        counted=states.split_counted(),
        signs=states.split_signs(),
        weights=VERDICT_ALONE,
        openings=recorded.openings,
    )


def bound_scores(
    loaded: LoadedModel,
    fits: Mapping[GateName, GateFit],
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
        fits: the gates, "vlm" among them.
        items: harmless prompts that no gate was fitted to.
        reads_pictures: whether text gates also read the words in pictures.
        reads_sentences: whether text gates also read each sentence by itself.
        epsilon: the false-positive rate that thresholds are set for.

    Returns:
        Scores (k, n) of k questions by the n gates, each in units of its ``spread``.
    """
    said = [spoken(p, reads_pictures) for p in items]
    settings = [tuple(s for s in PICTURED if s in settings_of(p)) for p in items]
    mixed = [query(p, s[n % len(s)]) for n, (p, s) in enumerate(zip(items, settings, strict=True))]
    layers = 1 + max(fits["vlm"].layers)  # no gate that sees pictures reads a layer above
    openings = next((fit.openings for fit in fits.values() if fit.openings), ())
    frame = find_frame(loaded.processor)
    text, signs = record_signs(loaded, said, openings, folder, "bound, text", progress, frame=frame)
    what = "bound, pictures"
    seen, _ = record_signs(loaded, mixed, (), folder, what, progress, layers=layers)
    texts = [one.text for one in said]
    others = record_readings(loaded, texts, reads_sentences, openings, frame, folder, progress)
    owner, place = others.of.T
    columns = []
    for name, fit in fits.items():
        if name == "vlm":
            found = torch.maximum(fit.scores(text), fit.scores(seen))
        else:
            of_others = fit.scores(others.states, others.signs)[place]
            found = fit.scores(text, signs).scatter_reduce(0, owner, of_others, "amax")
        columns.append(found / fit.spread)
    scores = torch.stack(columns, 1)
    _lower_refused(loaded, items, scores, ASKED * epsilon, recogniser)
    highest: dict[str, Tensor] = {}
    for prompt, score in zip(items, scores, strict=True):
        highest[prompt.cluster] = torch.maximum(score, highest.get(prompt.cluster, score))
    return torch.stack(list(highest.values()))


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
    fits: Mapping[GateName, GateFit], scores: Tensor, epsilon: float, harmful: Tensor
) -> dict[GateName, GateFit]:
    """The gates of a guard with their final thresholds: the text gate, and others that help.

    Thresholds move until the false-positive rate of all gates is within a bound: each by the same
    number of ``spread`` units of its gate. ``spread`` is cross-validated, because an overfitted
    gate scores unseen prompts far more widely than those it was fitted to, and would otherwise
    raise the thresholds of the other gates too.

    Gates share one false-positive budget, so another gate raises the threshold of the first. It is
    left out unless more harmful requests with a picture then open a gate.

    Args:
        fits: the fitted gates, "text" first.
        scores: the highest score of each gate for each harmless question, (k, n), in units of the
            gate's spread. No gate was fitted to these questions.
        epsilon: highest rate of harmless requests on which any gate opens, with the confidence of
            ``conformal.CONFIDENCE``.
        harmful: cross-validated scores (m, n) of the same harmful requests by each gate, as in
            ``GateFit.unseen``.
    """
    names = list(fits)
    most, kept, shift = -1, names[:1], 0.0
    for others in range(len(names)):
        for added in combinations(range(1, len(names)), others):
            columns = [0, *added]
            cut = conformal_threshold(scores[:, columns].max(1).values, epsilon)
            found = int((harmful[:, columns].max(1).values > cut).sum())
            if found > most:
                most, kept, shift = found, [names[n] for n in columns], cut
    return {name: fits[name].moved(shift) for name in kept}
