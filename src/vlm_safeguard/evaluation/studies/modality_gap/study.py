"""Measures refusals and separability in every condition, against text only."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from vlm_safeguard import method
from vlm_safeguard.artifact.config import TextFrame
from vlm_safeguard.calibration.gate_fitting import auc
from vlm_safeguard.data import prompts
from vlm_safeguard.data.inputs import Query, batches
from vlm_safeguard.data.ocr import reader
from vlm_safeguard.data.prompts import Prompt
from vlm_safeguard.data.sampling import thin
from vlm_safeguard.errors import DataError
from vlm_safeguard.evaluation.report.labels import RESPONSE_WORDS, cut_words
from vlm_safeguard.evaluation.studies.modality_gap.conditions import (
    CONDITIONS,
    Talk,
    messages,
    without_pictures,
)
from vlm_safeguard.evaluation.studies.provenance import provenance
from vlm_safeguard.guard import Guard, reads_pictures
from vlm_safeguard.model.chat import prepare, render_conversation
from vlm_safeguard.model.loading import LoadedModel
from vlm_safeguard.model.reasoning import decoded
from vlm_safeguard.model.recording import anchor_states, record
from vlm_safeguard.model.refusals import Verdict, judge
from vlm_safeguard.model.residual_stream import find_decoder
from vlm_safeguard.model.text_only import last_logits
from vlm_safeguard.runtime.gate import make_gate, refusal_signs
from vlm_safeguard.utils.progress import Progress
from vlm_safeguard.utils.stats import mcnemar, wilson

NOTE = "Refusals are found by their phrases: a smoke test, not a safety claim."
ABOUT = ("title", "group", "description", "needs_reading")
_BATCH = 16
PromptSet = Literal["malicious", "held"]
FILES: dict[str, str] = {"malicious": "eval_malicious.jsonl", "held": "calibration.jsonl"}


def study(
    loaded: LoadedModel,
    *,
    prompt_set: PromptSet = "malicious",
    per_set: int | None = None,
    guard: Guard | None = None,
    max_new_tokens: int = 32,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """The gap of ``loaded``, without a guard, on one of the package's sets of prompts.

    Greedy responses and, from the same pass, the states at the last prompt token. With ``guard``
    also how often its gates would open; it does not steer here.

    Args:
        prompt_set: the malicious evaluation set, or the plain ones of the harder calibration
            prompts that are held back for proofs.
        per_set: that many prompts of each label, evenly taken; None for all.

    Returns:
        What the study's JSON file holds. ``conditions`` has an entry for each of ``CONDITIONS``;
        one that the model cannot take has ``applicable`` False and the ``reason``. Layer lists are
        in the order of the decoder's layers.

    Raises:
        DataError: ``per_set`` is below 1, or there is no such set.
        GuardError: the guard belongs to another model.
        SafeguardError: the guard reads pictures and the OCR library is missing.
        ModelError: the states are not finite, or the request alone cannot be run.
    """
    if per_set is not None and per_set < 1:
        raise DataError(f"per_set is {per_set}: take at least one prompt of each label")
    if prompt_set not in FILES:
        raise DataError(f"no set of prompts {prompt_set!r}: use one of {', '.join(FILES)}")
    if guard:
        guard.check_model(loaded.model)
    read = reader().words if reads_pictures(guard) else None
    progress = progress or Progress(quiet=True)

    began = time.monotonic()
    every = _every(prompt_set)
    items = every if per_set is None else thin(every, per_set)
    directions = _directions(loaded, progress)
    spoken: dict[tuple[Talk, ...], Tensor] = {}  # states of conversations without pictures
    signs: dict[tuple[Talk, ...], dict[tuple[int, ...], Tensor]] = {}  # and refusal signs
    text: tuple[Tensor, list[Verdict]] | None = None
    table: dict[str, dict[str, Any]] = {}
    responses: list[dict[str, str]] = []
    for condition in CONDITIONS:
        talks = [condition.talk(prompt) for prompt in items]
        reason = obstacle(loaded, talks, max_new_tokens) if text else None
        about = {name: value for name, value in vars(condition).items() if name in ABOUT}
        table[condition.name] = about | {"applicable": not reason, "reason": reason}
        if reason:
            progress.say(f"{condition.title}: not applicable, {reason}")
            continue
        what = condition.title
        states, said = observe(
            loaded, talks, max_new_tokens=max_new_tokens, what=what, progress=progress
        )
        verdicts = [judge(one, p.prompt) for one, p in zip(said, items, strict=True)]
        text = text or (states, verdicts)  # the first condition is text only
        table[condition.name] |= _rates(items, verdicts, text[1])
        table[condition.name]["layers"] = _layers(items, states, text[0], directions)
        if guard:
            words = tuple(without_pictures(talk, read) for talk in talks)
            if words not in spoken:
                spoken[words] = read_texts(loaded, words, guard.config.frame, progress)
                signs[words] = {
                    tokens: signs_of(loaded, words, tokens)
                    for tokens in {tuple(g.openings) for g in guard.config.gates if g.openings}
                }
            table[condition.name]["gates"] = _gates(
                guard, items, states, spoken[words], signs[words]
            )
        responses += [
            {
                "condition": condition.name,
                "id": prompt.id,
                "label": prompt.label,
                "verdict": verdict,
                "response": cut_words(one, RESPONSE_WORDS),
            }
            for prompt, verdict, one in zip(items, verdicts, said, strict=True)
        ]
    files = ("anchors.jsonl", FILES[prompt_set])
    return {
        "model": {
            "name": Path(loaded.name).name,
            "layers": directions.shape[0],
        },
        "guard_sha256": guard.config.tensors_sha256 if guard else None,
        "guard_reads_pictures": reads_pictures(guard),
        "data_sha256": {name: prompts.digests()[name] for name in files},
        "made_with": provenance(loaded),
        "prompt_set": prompt_set,
        "n_harmful": sum(p.harmful for p in items),
        "n_harmless": sum(not p.harmful for p in items),
        "max_new_tokens": max_new_tokens,
        "note": NOTE,
        "seconds": round(time.monotonic() - began, 1),
        "conditions": table,
        "responses": responses,
    }


def _every(prompt_set: PromptSet) -> list[Prompt]:
    """All prompts of a set: requests that stand on their own, so that any picture may be put
    beside them."""
    if prompt_set == "malicious":
        return prompts.evaluation("malicious")
    return [p for p in prompts.calibration("held") if p.form == "plain"]


def inputs_of(loaded: LoadedModel, talks: Sequence[Talk]) -> dict[str, Tensor]:
    """Model inputs for a batch of conversations, on the model's device. Pictures stand in all of
    them or in none."""
    inputs = prepare(loaded.processor, [messages(talk) for talk in talks])
    return {key: value.to(loaded.device) for key, value in inputs.items()}


@torch.inference_mode()
def obstacle(loaded: LoadedModel, talks: Sequence[Talk], max_new_tokens: int) -> str | None:
    """Why the model cannot take such conversations, tried out on the longest; None if it can."""
    longest = max(talks, key=lambda talk: sum(len(turn.text) for turn in talk))
    fewer = tuple(replace(turn, images=turn.images[1:]) for turn in longest)
    try:
        rendered = [render_conversation(loaded.processor, messages(t)) for t in (longest, fewer)]
        if any(turn.images for turn in longest) and rendered[0] == rendered[1]:
            return "its chat template leaves out a picture"
        inputs = inputs_of(loaded, [longest])
        loaded.model(**inputs, use_cache=False, logits_to_keep=1)
    except Exception as error:  # templates, processors and models each raise their own kinds
        reason = str(error).strip().splitlines()
        return f"{type(error).__name__}: {reason[0]}" if reason else type(error).__name__
    room = getattr(loaded.model.config.get_text_config(), "max_position_embeddings", None)
    needed = inputs["input_ids"].shape[1] + max_new_tokens
    if room is not None and needed > room:
        return f"it takes {needed} tokens and the model has room for {room}"
    return None


def observe(
    loaded: LoadedModel,
    talks: Sequence[Talk],
    *,
    max_new_tokens: int,
    batch: int = _BATCH,
    what: str = "conversations",
    progress: Progress | None = None,
) -> tuple[Tensor, list[str]]:
    """States h_l(q) at the last prompt token, (k, L, d) float32, and greedy responses, in order.

    Raises:
        ModelError: a state is NaN or Inf.
    """
    said = [""] * len(talks)

    def encoded(group: list[int]) -> dict[str, Tensor]:
        return inputs_of(loaded, [talks[i] for i in group])

    def respond(group: list[int], inputs: dict[str, Tensor]) -> None:
        out = loaded.model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
        new = out[:, inputs["input_ids"].shape[1] :]
        for index, row in zip(group, new.tolist(), strict=True):
            said[index] = decoded(loaded.processor.tokenizer, row)

    with tempfile.TemporaryDirectory(prefix="vlm-safeguard-") as folder:
        states = record(
            loaded,
            [_as_request(talk) for talk in talks],
            Path(folder),
            what=what,
            batch=batch,
            decoder=find_decoder(loaded.model),
            encoded=encoded,
            run=respond,
            progress=progress,
        )
        return states.clone(), said


def read_texts(
    loaded: LoadedModel, talks: Sequence[Talk], frame: TextFrame | None, progress: Progress
) -> Tensor:
    """What text gates read of conversations without pictures, as ``record`` gives it.

    Raises:
        ModelError: a state is NaN or Inf.
    """
    with tempfile.TemporaryDirectory(prefix="vlm-safeguard-") as folder:
        states = record(
            loaded,
            [_as_request(talk) for talk in talks],
            Path(folder),
            what="words alone",
            batch=_BATCH,
            frame=frame,
            encoded=lambda group: inputs_of(loaded, [talks[i] for i in group]),
            progress=progress,
        )
        return states.clone()


@torch.inference_mode()
def signs_of(loaded: LoadedModel, talks: Sequence[Talk], openings: Sequence[int]) -> Tensor:
    """Refusal signs (k, 2) of conversations without pictures."""
    tokens = torch.tensor(openings, device=loaded.device)
    found = torch.empty(len(talks), 2)
    for group in batches(loaded.processor.tokenizer, [_as_request(t) for t in talks], _BATCH):
        inputs = inputs_of(loaded, [talks[i] for i in group])
        output = loaded.model(**inputs, use_cache=False, logits_to_keep=1)
        found[group] = refusal_signs(last_logits(output), tokens).cpu()
    return found


def _as_request(talk: Talk) -> Query:
    """All words of a talk, and a picture if there is one: what tells how long it is."""
    images = [image for turn in talk for image in turn.images]
    return Query(" ".join(turn.text for turn in talk), images[0] if images else None)


def _directions(loaded: LoadedModel, progress: Progress) -> Tensor:
    """The first safety steering direction of every layer, (L, d), from the anchors as text."""
    with tempfile.TemporaryDirectory(prefix="vlm-safeguard-") as folder:
        harmful, harmless = anchor_states(loaded, prompts.anchors(), Path(folder), progress)
        return torch.cat(
            [
                method.safety_directions(harmful[:, layer], harmless[:, layer], 1)
                for layer in range(harmful.shape[1])
            ]
        )


def _rates(
    items: Sequence[Prompt], verdicts: Sequence[Verdict], text: Sequence[Verdict]
) -> dict[str, Any]:
    """Refusals of harmful and harmless prompts, and exact McNemar p-values against text only.

    Beside them numbers of responses: degenerate or empty ones to any prompt, and those off the
    subject to harmful ones, which are neither refusals nor help.
    """
    found: dict[str, Any] = {
        "degenerate": sum(verdict in ("degenerate", "empty") for verdict in verdicts),
        "off_subject_harmful": sum(
            prompt.harmful and verdict == "off_subject"
            for prompt, verdict in zip(items, verdicts, strict=True)
        ),
    }
    for name, harmful in (("refused", True), ("over_refusal", False)):
        chosen = [i for i, prompt in enumerate(items) if prompt.harmful == harmful]
        here = [verdicts[i] == "refused" for i in chosen]
        there = [text[i] == "refused" for i in chosen]
        found |= wilson(sum(here), len(here)).as_dict(name) | {f"{name}_p": mcnemar(there, here)}
    return found


def _layers(
    items: Sequence[Prompt], states: Tensor, text: Tensor, directions: Tensor
) -> dict[str, list[float]]:
    """Per layer: AUC and means of h . v1, and how far the states have turned from text only.

    ``cosine_shift`` is the mean over prompts of 1 - cos(h, h as text only).
    """
    harmful = torch.tensor([prompt.harmful for prompt in items])
    along = torch.einsum("kld,ld->lk", states, directions)
    turned = 1 - torch.cosine_similarity(states.double(), text.double(), dim=2)
    found = {
        "auc": [auc(layer[harmful], layer[~harmful]) for layer in along],
        "mean_harmful": along[:, harmful].mean(1).tolist(),
        "mean_harmless": along[:, ~harmful].mean(1).tolist(),
        "cosine_shift": turned.mean(0).clamp(min=0.0).tolist(),
    }
    return {name: [round(value, 6) for value in values] for name, values in found.items()}


def _gates(
    guard: Guard,
    items: Sequence[Prompt],
    states: Tensor,
    words: Tensor,
    signs: Mapping[tuple[int, ...], Tensor],
) -> dict[str, dict[str, Any]]:
    """``{source: rates}``: how often the guard's gates would open, per source, with intervals.

    A text gate reads ``words``, the states of the conversation without its pictures (with the
    words in them, if the guard reads pictures), and ``signs``, by the openings they are about.
    """
    harmful = torch.tensor([prompt.harmful for prompt in items])
    opened: dict[str, Tensor] = {}
    for index, gate in enumerate(guard.config.gates):
        seen = (states if gate.source == "vlm" else words)[:, gate.layers]
        scorer = make_gate(gate, guard.tensors[f"gate.{index}"])
        if gate.per_layer:
            rows = (scorer.scores(seen) > 0).any(1)
        else:
            rows = scorer.total(seen, signs.get(tuple(gate.openings))) > 0
        opened[gate.source] = rows | opened.get(gate.source, torch.zeros_like(rows))
    return {
        source: wilson(int(rows[harmful].sum()), int(harmful.sum())).as_dict("tpr")
        | wilson(int(rows[~harmful].sum()), int((~harmful).sum())).as_dict("fpr")
        for source, rows in opened.items()
    }
