"""Searches for the steering: tries candidates on calibration prompts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

from vlm_safeguard.artifact.config import Steering
from vlm_safeguard.calibration.attack_trials import harmless_cost, successes, within, without
from vlm_safeguard.calibration.budget import Budget, Effort
from vlm_safeguard.calibration.recognition import BY_PHRASES, Recogniser
from vlm_safeguard.calibration.refusal_states import TOKENS
from vlm_safeguard.data.inputs import PICTURED, SETTINGS, Query, queries
from vlm_safeguard.data.prompts import Prompt
from vlm_safeguard.data.sampling import evenly, spaced
from vlm_safeguard.errors import CalibrationError
from vlm_safeguard.guard import Guard
from vlm_safeguard.model.loading import LoadedModel
from vlm_safeguard.model.residual_stream import find_decoder
from vlm_safeguard.utils.progress import Progress

# Times as many prompts as text as in another setting, for the finalists: as text most harmful ones
# are refused, and steering must not undo that.
AS_TEXT = 4

_Ranked = tuple[float, int, Steering]


def candidates(depth: int, verdict: bool, refusal: bool, most: int) -> list[Steering]:
    """Steering settings to try, from the strongest to the one closest to the paper. ``verdict``:
    whether a gate tells which texts the LLM would refuse. ``refusal``: whether states of the LLM's
    refusals were recorded. ``most``: directions per layer that there are.

    With few directions, much of what a picture changed stays in the states.

    Of equally good candidates the first is taken. A request's own text coordinates hardly undo a
    refusal of its text, so those with them stand before the mean of the anchors alone.

    The coordinates of a request, or of anchors, come from the last prompt token. At generated
    tokens they make the model repeat its first word. There the coordinates of refusals are
    restored: unsteered, a picture turns some refusals that begin with "I" into another sentence.
    """
    references: list[Literal["verdict", "text", "anchor"]] = ["text", "anchor"]
    if verdict:
        references = ["verdict", *references]
    whole, later = list(range(depth)), list(range(depth // 3, depth))
    found = [
        Steering(mode="restore", reference=reference, layers=layers, rank=most, tokens=1)
        for reference in references
        for layers in (whole, later)
    ]
    if refusal:
        longer = {"tokens": TOKENS + 1, "later": "refusal"}
        found = [one.model_copy(update=longer) for one in found] + found[::2]
    few = min(4, most)
    found.append(Steering(mode="restore", reference="anchor", layers=later, rank=few, tokens=8))
    found.append(Steering(mode="add", query="text", layers=later, rank=1, alpha=1.0))
    return found


def search(
    loaded: LoadedModel,
    build: Callable[[Steering], Guard],
    verdict: bool,
    refusal: bool,
    most: int,
    fit: Sequence[Prompt],
    budget: Budget,
    effort: Effort,
    progress: Progress,
    recogniser: Recogniser = BY_PHRASES,
) -> tuple[Guard, list[dict[str, Any]]]:
    """Choose the steering in two rounds.

    The first round tries all candidates on a few attacks with a blank image or a picture that
    succeed although a gate opens, because other attacks say nothing about the steering. The second
    round tries the best candidates on more prompts, in every setting: also as text, where steering
    can undo refusals.

    Args:
        build: makes a guard with the given steering.
        verdict: whether its gates tell which texts the LLM would refuse.
        refusal: whether it can restore the states of the LLM's refusals.
        most: directions per layer that there are.
        fit: calibration prompts that may be used for choices.

    Returns:
        The chosen guard, and the measurements of every candidate.

    Raises:
        CalibrationError: every candidate of the second round exceeds the KL budget.
    """
    settings = candidates(len(find_decoder(loaded.model).layers), verdict, refusal, most)
    attacks = [p for p in fit if p.harmful]
    few = _telling(loaded, build(settings[0]), attacks, effort, progress, recogniser)
    tried: list[dict[str, Any]] = []
    ranked: list[_Ranked] = []
    for steering in progress.track(settings, "steering candidates"):
        guard = build(steering)
        won = successes(loaded, guard, few, effort.tokens, recogniser)
        ranked.append((sum(won) / len(won), len(ranked), steering))
        tried.append({"steering": _brief(steering), "n": len(won), "asr": ranked[-1][0]})
    others = [p for p in fit[1::2] if not p.lookalike]
    harmless = [p for p in evenly(others, effort.final) if not p.harmful]
    every: list[Query] = []
    for setting in SETTINGS:
        count = effort.final * (AS_TEXT if setting == "text" else 1)
        harmful = [p for p in evenly(others, count) if p.harmful]
        every += queries(within(harmful, setting), setting)
    plain = without(loaded, build(settings[0]), every, effort.tokens, recogniser)
    kept: list[_Ranked] = []
    for _, place, steering in progress.track(_finalists(ranked, effort.finalists), "finalists"):
        guard = build(steering)
        won = plain.guarded(loaded, guard, effort.tokens, recogniser)
        rate = sum(won) / len(won)
        cost = harmless_cost(loaded, guard, harmless, recogniser)
        tried[place] |= {
            "final_n": len(won),
            "final_asr": round(rate, 4),
            "final_kl": round(cost.kl, 5),
        }
        if cost.least_kl <= budget.kl:
            kept.append((rate, place, steering))
    if not kept:
        raise CalibrationError(
            f"no guard: the mean KL divergence on harmless prompts exceeds {budget.kl} nats with "
            "every finalist. Allow more with --max-kl"
        )
    _, place, steering = min(kept, key=lambda one: one[:2])
    tried[place]["chosen"] = True
    return build(steering), tried


def _finalists(ranked: Sequence[_Ranked], count: int) -> list[_Ranked]:
    """The best ``count`` of candidates with their attack success and place: first the best of each
    kind, because few attacks do not tell kinds apart, and layers and ranks differ less."""
    order = sorted(ranked, key=lambda one: one[:2])
    firsts: dict[tuple[str, str], _Ranked] = {}
    for one in order:
        firsts.setdefault((one[2].mode, one[2].reference), one)
    chosen = list(firsts.values())
    return (chosen + [one for one in order if one not in chosen])[:count]


def _telling(
    loaded: LoadedModel,
    guard: Guard,
    attacks: Sequence[Prompt],
    effort: Effort,
    progress: Progress,
    recogniser: Recogniser,
) -> list[Query]:
    """``effort.search`` attacks with a blank image or a picture that tell candidates apart.

    First come attacks that succeed without a guard and open a gate, evenly spaced; where they are
    too few, others that succeed, then the rest. All candidates have the gates of ``guard``.
    """
    progress.say("attacks that succeed without a guard")
    tried = [
        request
        for setting in PICTURED
        for request in queries(
            evenly(within(attacks, setting), effort.scan // len(PICTURED)), setting
        )
    ]
    plain = without(loaded, guard, tried, effort.tokens, recogniser)
    ranks: tuple[list[Query], ...] = ([], [], [])
    for request, won, fired in zip(tried, plain.won, plain.fired, strict=True):
        ranks[2 if not won else 0 if fired else 1].append(request)
    chosen: list[Query] = []
    for found in ranks:
        chosen += spaced(found, effort.search - len(chosen))
    return chosen


def _brief(steering: Steering) -> dict[str, Any]:
    facts = steering.model_dump()
    layers = facts.pop("layers")
    return facts | {"layers": f"{layers[0]}-{layers[-1]}" if layers else "none"}
