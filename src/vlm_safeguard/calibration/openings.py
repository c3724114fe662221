"""Learns which tokens a model's refusals begin with, from its answers to the anchors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vlm_safeguard.artifact.config import MAX_OPENINGS
from vlm_safeguard.calibration.recognition import Recogniser, ask, contrasting
from vlm_safeguard.data.inputs import Query
from vlm_safeguard.data.sampling import spaced
from vlm_safeguard.model.loading import LoadedModel
from vlm_safeguard.utils.progress import Progress

BEGUN = 8  # answers that must begin with a token, so that it can be told what they are
ASKED, TOKENS = 16, 12  # so many of them are asked for, and so much of each
REFUSALS = 1 / 3  # share of them that must be refusals
# Share of the answers to harmless anchors that may begin with it. Reasoning begins all alike.
SELDOM = 0.1


def learn_openings(
    loaded: LoadedModel,
    asked: Sequence[Query],
    first: Tensor,
    recogniser: Recogniser,
    progress: Progress,
) -> list[int]:
    """Tokens that the model's refusals begin with.

    They begin answers to harmful anchors far more often than to harmless ones (``contrasting``), or
    a share ``REFUSALS`` of the answers that begin with them are refusals: "As an AI language model,
    I cannot" refuses, and "As an AI language model, I have no body" does not. The latter begin at
    most ``SELDOM`` of the answers to harmless anchors.

    Args:
        asked: the harmful anchors, then as many harmless ones, (2 N).
        first: the most likely first token of the answer to each, (2 N,).
        recogniser: tells refusals.
    """
    half = len(asked) // 2
    found = contrasting(first[:half], first[half:])
    others = [token for token in first.unique().tolist() if token not in found]
    begun = [(first == token).nonzero()[:, 0].tolist() for token in others]
    places = [
        place
        for every in begun
        if len(every) >= BEGUN and sum(n >= half for n in every) <= SELDOM * half
        for place in spaced(every, ASKED)
    ]
    chosen = [asked[place] for place in places]
    what = "beginnings of refusals"
    answers = ask(loaded, None, chosen, TOKENS, recogniser, what=what, progress=progress)
    refused = torch.tensor(recogniser.refused(chosen, answers), dtype=torch.double)
    begins = torch.tensor([answer.first for answer in answers])
    found += [
        token
        for token in first[places].unique().tolist()
        if (begins == token).any() and float(refused[begins == token].mean()) >= REFUSALS
    ]
    return found[:MAX_OPENINGS]
