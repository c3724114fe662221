"""Records the hidden states of the calibration prompts and fits gates to them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from vlm_safeguard import method
from vlm_safeguard.calibration.attack_trials import answered, within
from vlm_safeguard.calibration.budget import Budget, Effort
from vlm_safeguard.calibration.gate_candidates import Kind
from vlm_safeguard.calibration.gate_fitting import (
    KINDS,
    GateFit,
    fit_gate,
    refusal_openings,
)
from vlm_safeguard.calibration.kept_states import once
from vlm_safeguard.calibration.recognition import BY_PHRASES, Recogniser
from vlm_safeguard.calibration.recorded_states import Recorded, Sentences, States
from vlm_safeguard.data.inputs import (
    PICTURED,
    Query,
    Setting,
    queries,
    query,
    settings_of,
    spoken,
    told,
)
from vlm_safeguard.data.prompts import AnchorPair, CalibrationData, Prompt
from vlm_safeguard.data.sampling import evenly
from vlm_safeguard.errors import CalibrationError
from vlm_safeguard.model.canonical_text import canonical_text
from vlm_safeguard.model.loading import LoadedModel
from vlm_safeguard.model.recording import anchor_queries, record, record_with_logits
from vlm_safeguard.model.sentences import sentences
from vlm_safeguard.runtime.gate import refusal_signs
from vlm_safeguard.utils.progress import Progress

MAX_RANK = 64
IN_VLM_SHARE = 0.1  # of the false-positive budget
IN_VLM_DEPTH = 2 / 3  # of the decoder, that the gate in the VLM may read
# The model is asked the highest threshold-setting prompts: this many times those that a gate may
# open for.
ASKED = 3
Source = Literal["text", "vlm"]  # what a gate reads: the text-only pass, or the request's own

FOLDS = 5  # of the cross-validation that chooses a gate


def record_anchors(
    loaded: LoadedModel, pairs: Sequence[AnchorPair], folder: Path, progress: Progress
) -> tuple[Tensor, list[int]]:
    """Record the anchors as text.

    Returns:
        States (2, N, L, d): harmful anchors, then their harmless partners; and the tokens that the
        model's refusals begin with.
    """
    asked = anchor_queries(pairs)
    states, first = once(
        folder,
        asked,
        ("first tokens",),
        lambda place: record_with_logits(
            loaded, asked, place, lambda logits: logits.argmax(1), what="anchors", progress=progress
        ),
    )
    if first is None:
        raise CalibrationError(f"the states of the anchors in {folder} are damaged: delete it")
    openings = refusal_openings(first[: len(pairs)], first[len(pairs) :])
    return states.view(2, len(pairs), *states.shape[1:]), openings


def record_calibration(
    loaded: LoadedModel,
    data: CalibrationData,
    effort: Effort,
    reads_pictures: bool,
    reads_sentences: bool,
    folder: Path,
    progress: Progress,
) -> Recorded:
    """Record the states that gates are fitted to, or take what was recorded in ``folder`` before.

    They are memory-mapped from there.
    """
    pairs, openings = record_anchors(loaded, data.anchors, folder, progress)
    directions = {
        layer: method.safety_directions(pairs[0, :, layer], pairs[1, :, layer], MAX_RANK)
        for layer in range(pairs.shape[2])
    }
    fit = list(data.fit)
    # Prompts whose label shows in their text: the text gate reads nothing else.
    worded = evenly([p for p in fit if told(p, reads_pictures)], effort.worded)
    said = [spoken(p, reads_pictures) for p in worded]
    text = record_states(loaded, worded, said, "text", folder, progress, openings)
    harmless = [one.text for p, one in zip(worded, said, strict=True) if not p.harmful]
    single = record_sentences(
        loaded, harmless if reads_sentences else [], openings, folder, progress
    )
    pictured: dict[str, States] = {}
    for setting in PICTURED:
        chosen = evenly(within(fit, setting), effort.pictured)
        seen = queries(chosen, setting)
        pictured[setting] = record_states(loaded, chosen, seen, setting, folder, progress)
    untold = frozenset(p.id for p in fit if not told(p, reads_pictures))
    return Recorded(pairs, directions, openings, text, single, pictured, untold)


def record_sentences(
    loaded: LoadedModel,
    texts: Sequence[str],
    openings: Sequence[int],
    folder: Path,
    progress: Progress,
) -> Sentences:
    """Record the sentences of harmless prompts, of which the text gate reads ``texts``."""
    places: dict[str, int] = {}  # each once: those of a template repeat
    of: list[tuple[int, int]] = []
    for n, text in enumerate(texts):
        for one in sentences(canonical_text(text)):
            of.append((n, places.setdefault(one, len(places))))
    asked = [Query(one, None) for one in places]
    states, signs = record_signs(
        loaded, asked, openings if asked else (), folder, "sentences", progress, sentence=True
    )
    signs = torch.zeros(len(asked), 2) if signs is None else signs
    return Sentences(states, signs, torch.tensor(of, dtype=torch.long).reshape(-1, 2))


def record_states(
    loaded: LoadedModel,
    items: Sequence[Prompt],
    asked: Sequence[Query],
    setting: Setting,
    folder: Path,
    progress: Progress,
    openings: Sequence[int] = (),
) -> States:
    """States of ``items`` when the model is given the requests ``asked``, one for each item; with
    ``openings`` also their refusal signs.

    All harmful prompts count as found. Ordinary harmless prompts count as false positives, unless
    the verdict says that the model refuses them by itself. Of a prompt that means nothing without
    its picture it says nothing.
    """
    what = f"calibration prompts, {setting}"
    states, signs = record_signs(loaded, asked, openings, folder, what, progress)
    fold = [hashlib.sha256(p.cluster.encode()).digest()[0] % FOLDS for p in items]
    counted = torch.tensor([p.ordinary for p in items])
    if signs is not None:
        counted &= (signs[:, 1] == 0) | torch.tensor([p.form == "picture" for p in items])
    harmful = torch.tensor([p.harmful for p in items])
    ids = tuple(p.id for p in items)
    return States(ids, states, harmful, torch.tensor(fold), counted | harmful, signs)


def record_signs(
    loaded: LoadedModel,
    asked: Sequence[Query],
    openings: Sequence[int],
    folder: Path,
    what: str,
    progress: Progress,
    sentence: bool = False,
    layers: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """States of requests and, with ``openings``, their refusal signs; see ``refusal_signs``.

    With ``layers``, only those of so many layers from the first.
    """
    tokens = torch.tensor(openings, device=loaded.device) if openings else None

    def run(place: Path) -> tuple[Tensor, Tensor | None]:
        if tokens is None:
            found = record(loaded, asked, place, what=what, layers=layers, progress=progress)
            return found, None
        return record_with_logits(
            loaded,
            asked,
            place,
            lambda logits: refusal_signs(logits, tokens, sentence),
            what=what,
            progress=progress,
        )

    return once(folder, asked, (tuple(openings), sentence, layers), run)


def fit_to(
    recorded: Recorded,
    source: Source,
    budget: float,
    *,
    kinds: Sequence[Kind] = KINDS,
    pooled: bool = True,
    intent: bool = True,
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
        openings=recorded.openings,
        parts=parts,
    )


def fit_gates(recorded: Recorded, budget: Budget) -> tuple[GateFit, GateFit]:
    """Fit the text gate and the gate in the VLM.

    They share the false-positive budget. The text gate gets 90% of it, because it finds nearly all
    harmful requests.
    """
    epsilon = budget.false_positives
    text_gate = fit_to(recorded, "text", epsilon * (1 - IN_VLM_SHARE))
    in_vlm = fit_to(recorded, "vlm", epsilon * IN_VLM_SHARE)
    return text_gate, in_vlm


def bound_scores(
    loaded: LoadedModel,
    text_gate: GateFit,
    in_vlm: GateFit,
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
        text_gate: the text gate.
        in_vlm: the gate in the VLM.
        items: harmless prompts that no gate was fitted to.
        reads_pictures: whether the text gate also reads the words in pictures.
        reads_sentences: whether the text gate also reads each sentence by itself.
        epsilon: the false-positive rate that thresholds are set for.

    Returns:
        Scores (n, 2) of n questions by the text gate and by the gate in the VLM, each in units of
        its ``spread``.
    """
    said = [spoken(p, reads_pictures) for p in items]
    settings = [tuple(s for s in PICTURED if s in settings_of(p)) for p in items]
    mixed = [query(p, s[n % len(s)]) for n, (p, s) in enumerate(zip(items, settings, strict=True))]
    layers = 1 + max(in_vlm.layers)  # no gate that sees pictures reads a layer above
    text, signs = record_signs(loaded, said, text_gate.openings, folder, "bound, text", progress)
    what = "bound, pictures"
    seen, _ = record_signs(loaded, mixed, (), folder, what, progress, layers=layers)
    by_text = text_gate.scores(text, signs) / text_gate.spread
    texts = [one.text for one in said] if reads_sentences else []
    single = record_sentences(loaded, texts, text_gate.openings, folder, progress)
    of_parts = text_gate.scores(single.states, single.signs) / text_gate.spread
    owner, part = single.of.T
    by_text = by_text.scatter_reduce(0, owner, of_parts[part], "amax")
    by_vlm = torch.maximum(in_vlm.scores(text), in_vlm.scores(seen)) / in_vlm.spread
    scores = torch.stack([by_text, by_vlm], 1)
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
