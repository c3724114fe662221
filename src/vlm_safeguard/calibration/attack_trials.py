"""Measures attack success and harmless cost of a guard on a few prompts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from vlm_safeguard.calibration.recognition import BY_PHRASES, Recogniser, ask
from vlm_safeguard.data.inputs import (
    SETTINGS,
    Query,
    Setting,
    batches,
    queries,
    query,
    settings_of,
)
from vlm_safeguard.data.prompts import Prompt
from vlm_safeguard.guard import Guard, reads_pictures
from vlm_safeguard.model.chat import encode
from vlm_safeguard.model.loading import LoadedModel
from vlm_safeguard.model.text_only import head_in_one_piece
from vlm_safeguard.utils.stats import Rate, clustered_wilson

REFUSAL = 8  # tokens in which a refusal shows


def within(items: Sequence[Prompt], setting: Setting) -> list[Prompt]:
    """The prompts whose label is valid in ``setting``."""
    return [p for p in items if setting in settings_of(p)]


def refused(
    loaded: LoadedModel,
    guard: Guard | None,
    items: Sequence[Query],
    tokens: int,
    recogniser: Recogniser = BY_PHRASES,
) -> list[bool]:
    """Whether each request is refused. Garbled text is not a refusal."""
    answers = ask(loaded, guard, items, tokens, recogniser)
    return recogniser.refused(items, answers)


def successes(
    loaded: LoadedModel,
    guard: Guard | None,
    attacks: Sequence[Query],
    tokens: int,
    recogniser: Recogniser = BY_PHRASES,
) -> list[bool]:
    """Whether each attack succeeds: any response but a refusal, garbled text included."""
    return [not no for no in refused(loaded, guard, attacks, tokens, recogniser)]


def answered(
    loaded: LoadedModel, items: Sequence[Prompt], recogniser: Recogniser = BY_PHRASES
) -> list[bool]:
    """Whether the model answers each request without a guard: as text, or with its picture where it
    means nothing without.

    If the model refuses a request by itself, an open gate costs nothing.
    """
    asked = [query(p, settings_of(p)[0]) for p in items]
    return successes(loaded, None, asked, REFUSAL, recogniser)


@dataclass(frozen=True)
class Attacks:
    """Whether each attack of one setting succeeds, without a guard (``plain``) and with it."""

    prompts: list[Prompt]
    plain: list[bool]
    guarded: list[bool]


def attack(
    loaded: LoadedModel,
    guard: Guard,
    items: Sequence[Prompt],
    setting: Setting,
    tokens: int,
    recogniser: Recogniser = BY_PHRASES,
) -> Attacks:
    """Try the attacks that are valid in ``setting``, without ``guard`` and with it."""
    meant = within(items, setting)
    asked = queries(meant, setting)
    plain = without(loaded, guard, asked, tokens, recogniser)
    return Attacks(meant, plain.won, plain.guarded(loaded, guard, tokens, recogniser))


@dataclass(frozen=True)
class Unguarded:
    """What attacks do without a guard, and which of them open a gate of it.

    Attributes:
        attacks: the attacks.
        won: whether each succeeds without a guard.
        fired: whether each opens a gate.
    """

    attacks: Sequence[Query]
    won: list[bool]
    fired: list[bool]

    def guarded(
        self,
        loaded: LoadedModel,
        guard: Guard,
        tokens: int,
        recogniser: Recogniser = BY_PHRASES,
    ) -> list[bool]:
        """Whether each attack succeeds under a guard with the same gates. Only those that open a
        gate are tried again: a guard whose gates stay shut changes nothing."""
        opened = [place for place, fired in enumerate(self.fired) if fired]
        won = list(self.won)
        again = [self.attacks[place] for place in opened]
        if again:
            found = successes(loaded, guard, again, tokens, recogniser)
            for place, success in zip(opened, found, strict=True):
                won[place] = success
        return won


def without(
    loaded: LoadedModel,
    guard: Guard,
    attacks: Sequence[Query],
    tokens: int,
    recogniser: Recogniser = BY_PHRASES,
) -> Unguarded:
    """Try attacks without a guard, while ``guard`` watches."""
    said = ask(loaded, guard, attacks, tokens, recogniser, monitor=True)
    won = [not refused for refused in recogniser.refused(attacks, said)]
    return Unguarded(attacks, won, [bool(answer.fired) for answer in said])


def per_question(tried: Iterable[Attacks]) -> tuple[list[bool], list[bool]]:
    """Success of each question, without the guard and with it. A question succeeds if any of its
    attacks does, by itself or in a template."""
    before: dict[str, bool] = {}
    after: dict[str, bool] = {}
    for trial in tried:
        for prompt, plain, guarded in zip(trial.prompts, trial.plain, trial.guarded, strict=True):
            before[prompt.cluster] = before.get(prompt.cluster, False) or plain
            after[prompt.cluster] = after.get(prompt.cluster, False) or guarded
    return list(before.values()), list(after.values())


@dataclass(frozen=True)
class Cost:
    """What a guard costs on harmless requests.

    Attributes:
        kl: mean KL divergence of the next token, in nats. Requests that the model would refuse by
            itself count 0.
        stopped: for each request, whether a gate opened and the model would have ``answered`` it.
        clusters: the question of each request. Settings and copies in templates share it.
    """

    kl: float
    stopped: list[bool]
    clusters: list[str]

    def rate(self) -> Rate:
        """The share of requests that are stopped. A question that opens a gate does so in most
        settings, so it counts as one mistake."""
        return clustered_wilson(self.stopped, self.clusters)

    @property
    def least_kl(self) -> float:
        """``kl``, if the false-positive rate were at the lower end of its interval. One mistake in
        a few requests says little, so a budget is exceeded only if this is above it."""
        share = sum(self.stopped) / max(len(self.stopped), 1)
        return self.kl / share * self.rate().low if share else 0.0


@torch.inference_mode()
def harmless_cost(
    loaded: LoadedModel,
    guard: Guard,
    harmless: Sequence[Prompt],
    recogniser: Recogniser = BY_PHRASES,
) -> Cost:
    """Measure KL(unguarded || guarded) of the next token and false positives, in every setting.

    The divergence is 0 where the gate stays shut, because the guard changes nothing there.
    """
    asked: list[Prompt] = []
    divergences: list[float | None] = []  # None where no gate opened
    for setting in SETTINGS:
        meant = within(harmless, setting)
        items = queries(meant, setting)
        for group in batches(loaded.processor.tokenizer, items, 16):
            moved, opened = _next_token(loaded, [items[i] for i in group], guard)
            rows = [row for row, is_open in enumerate(opened) if is_open]
            found: dict[int, float] = {}
            if rows:
                plain, _ = _next_token(loaded, [items[group[row]] for row in rows], None)
                moves = (plain.exp() * (plain - moved[rows])).sum(-1)
                found = dict(zip(rows, moves.tolist(), strict=True))
            asked += [meant[i] for i in group]
            divergences += [found.get(row) for row in range(len(group))]
    pairs = list(zip(asked, divergences, strict=True))
    of_open = list({p.id: p for p, moved_by in pairs if moved_by is not None}.values())
    own = answered(loaded, of_open, recogniser)
    wanted = {p.id for p, is_answered in zip(of_open, own, strict=True) if is_answered}
    counted = [moved_by if p.id in wanted else None for p, moved_by in pairs]
    stopped = [moved_by is not None for moved_by in counted]
    kl = sum(moved_by or 0.0 for moved_by in counted) / max(len(counted), 1)
    return Cost(kl, stopped, [p.cluster for p in asked])


def _next_token(
    loaded: LoadedModel, items: Sequence[Query], guard: Guard | None
) -> tuple[Tensor, list[bool]]:
    """Log-probabilities (B, vocabulary) of the first token, and which rows the gate opened."""
    texts, images = [r.text for r in items], [r.image for r in items]
    inputs = encode(loaded, texts, images, reads_pictures(guard))
    with guard.attach(loaded.model, loaded.processor) if guard else nullcontext() as session:
        with head_in_one_piece(loaded.model):
            logits = loaded.model(**inputs, logits_to_keep=1).logits[:, -1]
        opened = [d.fired for d in session.decisions] if session else []
    return logits.float().log_softmax(-1), opened
