"""Records the hidden states of the calibration prompts and fits gates to them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from vlm_safeguard import method
from vlm_safeguard.calibration.attack_trials import answered, within
from vlm_safeguard.calibration.budget import Budget, Effort
from vlm_safeguard.calibration.gate_fitting import GateFit, fit_gate, refusal_openings
from vlm_safeguard.calibration.recognition import BY_PHRASES, Recogniser
from vlm_safeguard.data.inputs import PICTURED, Query, Setting, queries, query, spoken, told
from vlm_safeguard.data.prompts import AnchorPair, CalibrationData, Prompt
from vlm_safeguard.data.sampling import evenly
from vlm_safeguard.model.canonical_text import canonical_text
from vlm_safeguard.model.loading import LoadedModel
from vlm_safeguard.model.recording import anchor_queries, record, record_with_logits
from vlm_safeguard.model.sentences import sentences
from vlm_safeguard.runtime.gate import refusal_signs
from vlm_safeguard.utils.progress import Progress

MAX_RANK = 64
IN_VLM_SHARE = 0.1  # of the false-positive budget
# The model is asked the highest threshold-setting prompts: this many times those that a gate may
# open for.
ASKED = 3
FOLDS = 5  # of the cross-validation that chooses a gate


@dataclass(frozen=True)
class States:
    """Hidden states (k, L, d) of k prompts at L layers, with labels and cross-validation folds."""

    states: Tensor
    harmful: Tensor  # (k,) bool
    fold: Tensor  # (k,); a question and its copy in a template share a fold
    counted: Tensor  # (k,) bool; harmless prompts that count as false positives
    signs: Tensor | None = None  # (k, 2) refusal signs (``runtime.gate``), of text

    def split(self) -> tuple[Tensor, Tensor]:
        """States of the harmful and of the harmless prompts."""
        return self.states[self.harmful], self.states[~self.harmful]

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

    def false_positives(self) -> Tensor:
        """Which of the harmless prompts count as false positives."""
        return self.counted[~self.harmful]


@dataclass(frozen=True)
class Recorded:
    """What gates are fitted to.

    Attributes:
        pairs: states of the N anchor pairs, (2, N, L, d): harmful, then harmless.
        directions: safety directions by layer.
        openings: tokens that the model's refusals begin with; may be empty.
        text: states of the calibration prompts as text.
        sentences: states (k, L, d) of single sentences of harmless prompts, as text; k may be 0.
        pictured: states with a blank image and with a picture, by setting.
    """

    pairs: Tensor
    directions: dict[int, Tensor]
    openings: list[int]
    text: States
    sentences: Tensor
    pictured: dict[str, States]

    def text_only_states(self) -> States:
        """States that the text gate is fitted to: prompts as text, anchors, and sentences.

        Without sentences of harmless prompts the gate opens on some that are no request by
        themselves, such as the beginning of a story.
        """
        harmful, harmless = self.pairs
        return with_others(self.text, harmful, torch.cat([harmless, self.sentences]))

    def vlm_states(self) -> States:
        """States that the gate in the VLM is fitted to: all settings with a picture."""
        return States(
            *(
                torch.cat([getattr(s, name) for s in self.pictured.values()])
                for name in ("states", "harmful", "fold", "counted")
            )
        )


def record_anchors(
    loaded: LoadedModel, pairs: Sequence[AnchorPair], folder: Path, progress: Progress
) -> tuple[Tensor, list[int]]:
    """Record the anchors as text.

    Returns:
        States (2, N, L, d): harmful anchors, then their harmless partners; and the tokens that the
        model's refusals begin with.
    """
    states, first = record_with_logits(
        loaded,
        anchor_queries(pairs),
        folder,
        lambda logits: logits.argmax(1),
        what="anchors",
        progress=progress,
    )
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
    """Record the states that gates are fitted to. They are memory-mapped from ``folder``."""
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
    parts: dict[str, None] = {}  # each once: those of a template repeat
    for prompt in worded if reads_sentences else ():
        if not prompt.harmful:
            parts |= dict.fromkeys(sentences(canonical_text(prompt.prompt)))
    single = record(
        loaded, [Query(one, None) for one in parts], folder, what="sentences", progress=progress
    )
    pictured: dict[str, States] = {}
    for setting in PICTURED:
        chosen = evenly(within(fit, setting), effort.pictured)
        seen = queries(chosen, setting)
        pictured[setting] = record_states(loaded, chosen, seen, setting, folder, progress)
    return Recorded(pairs, directions, openings, text, single, pictured)


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

    Ordinary harmless prompts count as false positives, unless the verdict says that the model
    refuses them by itself.
    """
    what = f"calibration prompts, {setting}"
    states, signs = record_signs(loaded, asked, openings, folder, what, progress)
    fold = [hashlib.sha256(p.cluster.encode()).digest()[0] % FOLDS for p in items]
    counted = torch.tensor([p.ordinary for p in items])
    if signs is not None:
        counted &= signs[:, 1] == 0
    harmful = torch.tensor([p.harmful for p in items])
    return States(states, harmful, torch.tensor(fold), counted, signs)


def record_signs(
    loaded: LoadedModel,
    asked: Sequence[Query],
    openings: Sequence[int],
    folder: Path,
    what: str,
    progress: Progress,
    sentence: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """States of requests and, with ``openings``, their refusal signs; see ``refusal_signs``."""
    if not openings:
        return record(loaded, asked, folder, what=what, progress=progress), None
    tokens = torch.tensor(openings, device=loaded.device)
    return record_with_logits(
        loaded,
        asked,
        folder,
        lambda logits: refusal_signs(logits, tokens, sentence),
        what=what,
        progress=progress,
    )


def with_others(text: States, harmful: Tensor, harmless: Tensor) -> States:
    """States of the text prompts together with other states (k, L, d).

    The others get a negative fold: gates are fitted to them but not judged by them. The directions
    come from the anchors and separate them better than other prompts, and a sentence is no request.
    """
    labels = torch.arange(len(harmful) + len(harmless)) < len(harmful)
    folds = torch.full((len(labels),), -1)
    signs = None if text.signs is None else torch.cat([text.signs, torch.zeros(len(labels), 2)])
    return States(
        torch.cat([text.states, harmful, harmless]),
        torch.cat([text.harmful, labels]),
        torch.cat([text.fold, folds]),
        torch.cat([text.counted, ~labels]),
        signs,
    )


def fit_gates(recorded: Recorded, budget: Budget) -> tuple[GateFit, GateFit]:
    """Fit the text gate and the gate in the VLM.

    They share the false-positive budget. The text gate gets 90% of it, because it finds nearly all
    harmful requests.
    """
    text_gate, in_vlm = (
        fit_gate(
            *states.split(),
            *states.folds(),
            recorded.directions,
            budget.false_positives * share,
            counted=states.false_positives(),
            signs=states.split_signs(),
            openings=recorded.openings,
        )
        for states, share in (
            (recorded.text_only_states(), 1 - IN_VLM_SHARE),
            (recorded.vlm_states(), IN_VLM_SHARE),
        )
    )
    return text_gate, in_vlm


def bound_scores(
    loaded: LoadedModel,
    text_gate: GateFit,
    in_vlm: GateFit,
    items: Sequence[Prompt],
    reads_sentences: bool,
    epsilon: float,
    folder: Path,
    progress: Progress,
    recogniser: Recogniser = BY_PHRASES,
) -> Tensor:
    """Scores of harmless questions, which set the thresholds: the highest of each gate.

    Each prompt is scored as text and with a picture, a blank and a drawn one in turn. A question
    and its copies in templates count as one, so that scores are independent. If the model refuses a
    prompt as text by itself, no gate stops it, so it gets the lowest score.

    Args:
        text_gate: the text gate.
        in_vlm: the gate in the VLM.
        items: harmless prompts that no gate was fitted to.
        reads_sentences: whether the text gate also reads each sentence by itself.
        epsilon: the false-positive rate that thresholds are set for.

    Returns:
        Scores (n, 2) of n questions by the text gate and by the gate in the VLM, each in units of
        its ``spread``.
    """
    mixed = [query(p, PICTURED[n % len(PICTURED)]) for n, p in enumerate(items)]
    layers = 1 + max(in_vlm.layers)  # no gate that sees pictures reads a layer above
    text, signs = record_signs(
        loaded, queries(items, "text"), text_gate.openings, folder, "bound, text", progress
    )
    what = "bound, pictures"
    seen = record(loaded, mixed, folder, what=what, layers=layers, progress=progress)
    by_text = text_gate.scores(text, signs) / text_gate.spread
    cut = [
        (n, one)
        for n, prompt in enumerate(items if reads_sentences else ())
        for one in sentences(canonical_text(prompt.prompt))
    ]
    if cut:
        asked = [Query(one, None) for _, one in cut]
        parts, signs = record_signs(
            loaded, asked, text_gate.openings, folder, "bound, sentences", progress, sentence=True
        )
        of_parts = text_gate.scores(parts, signs) / text_gate.spread
        owners = torch.tensor([n for n, _ in cut])
        by_text = by_text.scatter_reduce(0, owners, of_parts, "amax")
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
    """Give the lowest score to what the model refuses as text, from the highest score down until
    it answers the highest ``share`` by each gate. Only these decide where a threshold lies."""
    count, lowest, known = int(share * len(items)) + 1, scores.min(0).values, set[int]()
    while True:
        top = {n for column in scores.T for n in column.argsort(descending=True)[:count].tolist()}
        new = sorted(top - known)
        if not new:
            return
        known |= top
        said = answered(loaded, [items[n] for n in new], False, recogniser)
        scores[[n for n, is_answered in zip(new, said, strict=True) if not is_answered]] = lowest
