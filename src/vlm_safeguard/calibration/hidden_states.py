"""Records the hidden states of the calibration prompts."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from vlm_safeguard import method
from vlm_safeguard.artifact.config import TextFrame
from vlm_safeguard.calibration.attack_trials import within
from vlm_safeguard.calibration.budget import Effort
from vlm_safeguard.calibration.kept_states import once
from vlm_safeguard.calibration.openings import learn_openings
from vlm_safeguard.calibration.recognition import BY_PHRASES, Recogniser
from vlm_safeguard.calibration.recorded_states import Readings, Recorded, States
from vlm_safeguard.calibration.refusal_states import record_refusals
from vlm_safeguard.data.inputs import (
    PICTURED,
    Query,
    Setting,
    queries,
    spoken,
    told,
)
from vlm_safeguard.data.prompts import AnchorPair, CalibrationData, Prompt
from vlm_safeguard.data.sampling import evenly
from vlm_safeguard.errors import CalibrationError
from vlm_safeguard.model.canonical_text import canonical_text
from vlm_safeguard.model.loading import LoadedModel
from vlm_safeguard.model.recording import anchor_queries, record, record_with_logits
from vlm_safeguard.model.residual_stream import find_decoder
from vlm_safeguard.model.sentences import sentences
from vlm_safeguard.model.words import find_frame
from vlm_safeguard.runtime.gate import refusal_signs
from vlm_safeguard.utils.progress import Progress

MAX_RANK = 128  # safety directions of a layer
FOLDS = 5  # of the cross-validation that chooses a gate


def record_anchors(
    loaded: LoadedModel,
    pairs: Sequence[AnchorPair],
    frame: TextFrame | None,
    folder: Path,
    progress: Progress,
) -> tuple[Tensor, Tensor]:
    """Record the anchors as text.

    Returns:
        States (2, N, L, d), or wider with ``frame`` (see ``record``): harmful anchors,
        then their harmless partners; and the most likely first tokens of their answers, (2 N,).
    """
    asked = anchor_queries(pairs)
    states, first = once(
        folder,
        asked,
        ("first tokens", frame),
        lambda place: record_with_logits(
            loaded,
            asked,
            place,
            lambda logits: logits.argmax(1),
            what="anchors",
            frame=frame,
            progress=progress,
        ),
    )
    if first is None:
        raise CalibrationError(f"the states of the anchors in {folder} are damaged: delete it")
    return states.view(2, len(pairs), *states.shape[1:]), first


def record_calibration(
    loaded: LoadedModel,
    data: CalibrationData,
    effort: Effort,
    reads_pictures: bool,
    reads_sentences: bool,
    folder: Path,
    progress: Progress,
    refusals: Recogniser = BY_PHRASES,
) -> Recorded:
    """Record the states that gates are fitted to, or take what was recorded in ``folder`` before.

    They are memory-mapped from there.
    """
    frame = find_frame(loaded)
    pairs, first = record_anchors(loaded, data.anchors, frame, folder, progress)
    asked = anchor_queries(data.anchors)
    openings = learn_openings(loaded, asked, first, refusals, progress)
    width = find_decoder(loaded.model).hidden_size
    rank = min(MAX_RANK, pairs.shape[1], width)
    directions = {
        layer: method.safety_directions(
            pairs[0, :, layer, :width], pairs[1, :, layer, :width], rank
        )
        for layer in range(pairs.shape[2])
    }
    fit = list(data.fit)
    # Prompts whose label shows in their text: the text gate reads nothing else.
    worded = evenly([p for p in fit if told(p, reads_pictures)], effort.worded)
    said = [spoken(p, reads_pictures) for p in worded]
    text = record_states(loaded, worded, said, "text", folder, progress, openings, frame)
    harmless = [one.text for p, one in zip(worded, said, strict=True) if not p.harmful]
    others = record_readings(loaded, harmless, reads_sentences, openings, frame, folder, progress)
    pictured: dict[str, States] = {}
    for setting in PICTURED:
        chosen = evenly(within(fit, setting), effort.pictured)
        seen = queries(chosen, setting)
        pictured[setting] = record_states(loaded, chosen, seen, setting, folder, progress)
    untold = frozenset(p.id for p in fit if not told(p, reads_pictures))
    begun = torch.isin(first[: len(data.anchors)], torch.tensor(openings, dtype=first.dtype))
    refused = [asked[place] for place in begun.nonzero()[:, 0].tolist()]
    begins = record_refusals(loaded, refused, progress)
    return Recorded(pairs, directions, openings, text, others, pictured, untold, begins)


def record_readings(
    loaded: LoadedModel,
    texts: Sequence[str],
    by_sentence: bool,
    openings: Sequence[int],
    frame: TextFrame | None,
    folder: Path,
    progress: Progress,
) -> Readings:
    """Record what the text gate reads beside the ``texts`` of harmless prompts: the canonical form
    of those that are written otherwise and, ``by_sentence``, each sentence."""
    places: dict[str, int] = {}  # each once: sentences of a template repeat
    of: list[tuple[int, int]] = []
    for n, text in enumerate(texts):
        form = canonical_text(text)
        readings = [] if form == text else [form]
        readings += sentences(form) if by_sentence else []
        of += [(n, places.setdefault(one, len(places))) for one in readings]
    asked = [Query(one, None) for one in places]
    states, signs = record_signs(
        loaded,
        asked,
        openings if asked else (),
        folder,
        "readings",
        progress,
        judged=False,
        frame=frame,
    )
    signs = torch.zeros(len(asked), 2) if signs is None else signs
    return Readings(states, signs, torch.tensor(of, dtype=torch.long).reshape(-1, 2))


def record_states(
    loaded: LoadedModel,
    items: Sequence[Prompt],
    asked: Sequence[Query],
    setting: Setting,
    folder: Path,
    progress: Progress,
    openings: Sequence[int] = (),
    frame: TextFrame | None = None,
) -> States:
    """States of ``items`` when the model is given the requests ``asked``, one for each item; with
    ``openings`` also their refusal signs, with ``frame`` also means (see ``record``).

    All harmful prompts count as found. Ordinary harmless prompts count as false positives, unless
    the verdict says that the model refuses them by itself. Of a prompt that means nothing without
    its picture it says nothing.
    """
    what = f"calibration prompts, {setting}"
    states, signs = record_signs(loaded, asked, openings, folder, what, progress, frame=frame)
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
    judged: bool = True,
    layers: int | None = None,
    frame: TextFrame | None = None,
) -> tuple[Tensor, Tensor | None]:
    """States of requests and, with ``openings``, their refusal signs; see ``refusal_signs``.

    ``judged``: whether these texts have a verdict. As at runtime, it is that of the canonical form.
    With ``layers``, only states of so many layers from the first; ``frame``: as in ``record``.
    """

    def signs(logits: Tensor) -> Tensor:
        tokens = torch.tensor(openings, device=logits.device)
        return refusal_signs(logits, tokens, torch.full((len(logits),), judged))

    def run(place: Path) -> tuple[Tensor, Tensor | None]:
        if not openings:
            found = record(
                loaded, asked, place, what=what, layers=layers, frame=frame, progress=progress
            )
            return found, None
        return record_with_logits(
            loaded,
            asked,
            place,
            signs,
            what=what,
            frame=frame,
            progress=progress,
        )

    states, found = once(folder, asked, (tuple(openings), judged, layers, frame), run)
    if found is None or not judged:
        return states, found
    odd = {
        n: replace(one, text=form)
        for n, one in enumerate(asked)
        if (form := canonical_text(one.text)) != one.text
    }
    if not odd:
        return states, found
    what = f"{what}, canonical"
    _, canonical = record_signs(loaded, [*odd.values()], openings, folder, what, progress)
    found = found.clone()
    if canonical is not None:
        found[[*odd], 1] = canonical[:, 1]
    return states, found
