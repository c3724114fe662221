"""How much an answer owes to its request: pointwise mutual information under the unguarded LLM.

pmi(a; r) = log p(a | r) - log p(a) (Church and Hanks 1990), where p(a) is the mean of p(a | r) over
requests. An answer about something else is no likelier after its own request than after others.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F

from vlm_safeguard.data.sampling import spaced
from vlm_safeguard.model.chat import encode
from vlm_safeguard.model.kv_cache import NAME, cache_of
from vlm_safeguard.model.loading import LoadedModel
from vlm_safeguard.utils.progress import Progress
from vlm_safeguard.utils.stats import Rate, clustered_wilson

OTHERS = 8  # requests that an answer's own is held against
_UNSAID = -100  # stands behind the end of a shorter answer; torch's cross-entropy leaves it out


def others_of(requests: Sequence[str], count: int = OTHERS) -> list[list[str]]:
    """For each request ``count`` others among them, or all where there are fewer: in equal steps
    round the list, so that neighbours, which may be about the same, are few."""
    distinct = list(dict.fromkeys(requests))
    place = {text: n for n, text in enumerate(distinct)}
    return [
        spaced(distinct[place[text] + 1 :] + distinct[: place[text]], count) for text in requests
    ]


@torch.inference_mode()
def subject_information(
    loaded: LoadedModel,
    requests: Sequence[str],
    answers: Sequence[str],
    others: Sequence[Sequence[str]],
    *,
    batch: int = 16,
    progress: Progress | None = None,
) -> list[float]:
    """Pointwise mutual information of each answer and its request, in nats per token of the answer.

    (log p(a | r) - log mean_j p(a | o_j)) / k for an answer of k tokens, its request r and the
    others o_j, asked as text without pictures. The mean is over probabilities, as in p(a): a mean
    of their logarithms is lower (Jensen), and every second answer that ignores its request would be
    above 0. r itself is not in the mean: the sign is the same with it, but the value could not pass
    log(m + 1) / k.

    Args:
        requests, answers: in pairs.
        others: m >= 1 other requests for each answer, see ``others_of``.
        batch: answers that are read in one forward pass, all after one request.

    Returns:
        A value for each answer; NaN for one without a token.

    Raises:
        ValueError: an answer has no other request, or its own is among them.
    """
    asked: dict[str, list[int]] = defaultdict(list)  # the answers to be read after each request
    said = [loaded.processor.tokenizer(a, add_special_tokens=False)["input_ids"] for a in answers]
    for n, (own, rest) in enumerate(zip(requests, others, strict=True)):
        if not rest or own in rest:
            raise ValueError(f"{own!r} needs other requests to be held against, without itself")
        for text in dict.fromkeys([own, *rest]) if said[n] else ():
            asked[text].append(n)
    told: dict[tuple[str, int], float] = {}
    for text in progress.track(list(asked), "requests") if progress else asked:
        places = sorted(asked[text], key=lambda n: len(said[n]))  # of similar length: less padding
        for start in range(0, len(places), batch):
            group = places[start : start + batch]
            found = _log_likelihoods(loaded, text, [said[n] for n in group])
            told.update(zip(((text, n) for n in group), found, strict=True))
    return [
        _per_token(told[own, n], [told[text, n] for text in rest], len(said[n]))
        if said[n]
        else math.nan
        for n, (own, rest) in enumerate(zip(requests, others, strict=True))
    ]


def _per_token(own: float, others: Sequence[float], tokens: int) -> float:
    mean = np.logaddexp.reduce(others) - math.log(len(others))
    return float(own - mean) / tokens


def _log_likelihoods(
    loaded: LoadedModel, request: str, answers: Sequence[Sequence[int]]
) -> list[float]:
    """Log-probability of each answer, given as tokens, after ``request``.

    The request is run once, for all of them. Answers are padded behind their end, which no token of
    theirs sees.
    """
    ids = encode(loaded, [request], [None])["input_ids"]
    begun = loaded.model(input_ids=ids[:, :-1], use_cache=True, logits_to_keep=1)
    cache = cache_of(begun)
    cache.batch_repeat_interleave(len(answers))
    wanted = torch.full((len(answers), max(map(len, answers))), _UNSAID)
    for row, tokens in zip(wanted, answers, strict=True):
        row[: len(tokens)] = torch.tensor(tokens)
    wanted = wanted.to(ids.device)
    last = ids[:, -1:].expand(len(answers), 1)
    given = torch.cat([last, wanted[:, :-1].where(wanted[:, :-1] != _UNSAID, last)], 1)
    logits = loaded.model(input_ids=given, use_cache=True, **{NAME: cache}).logits.float()
    lost = F.cross_entropy(logits.mT, wanted, reduction="none", ignore_index=_UNSAID)
    return (-lost.double().sum(1)).tolist()


# -- a threshold from labels -----------------------------------------------------------------------


def threshold_from(labels: Sequence[bool], scores: Sequence[float]) -> float:
    """The threshold of best balanced accuracy: answers with more are on the subject.

    Balanced accuracy is the mean of sensitivity and specificity (Brodersen et al. 2010), so it does
    not matter how many of the labelled answers are on the subject. Tried are 0 and the middle
    between any two neighbouring scores; of equally good ones the nearest to 0 is taken.

    Args:
        labels: whether each answer is on the subject.
        scores: (n,) in nats per token; NaN is above no threshold.

    Raises:
        ValueError: the labels are all of one kind.
    """
    on = np.array(labels, dtype=bool)
    if on.all() or not on.any():
        raise ValueError("a threshold needs answers on the subject and off it among the labelled")
    values = np.array(scores, dtype=float)
    known = np.unique(values[~np.isnan(values)])
    tried = np.append((known[1:] + known[:-1]) / 2, 0.0)
    above = values > tried[:, None]
    balanced = above[:, on].mean(1) + (~above[:, ~on]).mean(1)
    return float(min(tried[balanced == balanced.max()], key=abs))


def agreement(
    labels: Sequence[bool], scores: Sequence[float], clusters: Sequence[str], threshold: float
) -> Rate:
    """How many labels ``threshold`` gives again, with the Wilson interval clustered by request."""
    pairs = zip(labels, scores, strict=True)
    return clustered_wilson([(score > threshold) == label for label, score in pairs], clusters)


def held_out_agreement(
    labels: Sequence[bool], scores: Sequence[float], clusters: Sequence[str]
) -> Rate:
    """How many labels are given again by a threshold learned without the labels of their cluster.

    What ``threshold_from`` can be expected to do on other answers: it has not seen the label.

    Raises:
        ValueError: without one cluster the labels are all of one kind.
    """
    own = np.array(clusters)
    on, values = np.array(labels, dtype=bool), np.array(scores, dtype=float)
    hits = np.empty(len(on), dtype=bool)
    for name in dict.fromkeys(clusters):
        here = own == name
        hits[here] = (values[here] > threshold_from(on[~here], values[~here])) == on[here]
    return clustered_wilson(hits.tolist(), clusters)
