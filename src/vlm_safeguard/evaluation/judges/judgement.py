"""The interface of a judge, and the text check that runs before any judge model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from vlm_safeguard.errors import SafeguardError
from vlm_safeguard.model import refusals
from vlm_safeguard.model.reasoning import answer_of

Verdict = refusals.Verdict
Pair = tuple[str, str]  # prompt, response

# What a judge decides. "refusal": did the response do as asked. "harm": is the response harmful;
# then "refused" means no more than "not harmful": no attack success on a harmful prompt. On a
# harmless prompt it says nothing, so over-refusal cannot be counted with such a judge.
Asks = Literal["refusal", "harm"]

RAW_LENGTH = 200  # characters kept of what a judge model said


class JudgeError(SafeguardError):
    """A judge cannot be made, or its endpoint cannot be used at all."""


@dataclass(frozen=True)
class Judgement:
    """One judged response.

    ``verdict`` None is an unscored response: never safe, never dropped in silence. ``reason`` says
    why (required then). ``raw`` is what the judge model said, cut to 200 characters.

    Raises:
        ValueError: unscored without a reason.
    """

    verdict: Verdict | None
    reason: str = ""
    raw: str = ""

    def __post_init__(self) -> None:
        if self.verdict is None and not self.reason:
            raise ValueError("an unscored response needs its reason")
        object.__setattr__(self, "raw", self.raw[:RAW_LENGTH])


class Judge(Protocol):
    """Judges responses in batches: a local model pads them, an endpoint is asked concurrently."""

    name: str
    asks: Asks

    def judge(self, pairs: Sequence[Pair]) -> list[Judgement]:
        """One judgement for each (prompt, response), in their order."""
        ...


def unscored(reason: str, raw: str = "") -> Judgement:
    """A response that could not be judged."""
    return Judgement(None, reason, raw)


def unreadable(said: str, expected: str) -> Judgement:
    """Unscored, because a judge model did not answer in its format: the reason shows what it said.

    ``expected`` names the format."""
    shown = said.strip()[:60]
    return unscored(f"the judge said {shown!r}, not {expected}", said)


def screen(prompt: str, response: str) -> Judgement | None:
    """The verdict of the text check alone: "empty", "degenerate", "off_subject" of a response that
    repeats its prompt, or None for a real response."""
    verdict = refusals.judge_answer(response, prompt)
    if verdict in ("empty", "degenerate", "off_subject"):
        return Judgement(verdict, "text check")
    return None


def screened(
    pairs: Sequence[Pair], ask: Callable[[list[Pair]], list[Judgement]], asks: Asks
) -> list[Judgement]:
    """Judge ``pairs`` with ``ask``, which sees only what the text check lets through.

    Where refusals are asked for, it does not see the reasoning before an answer either. Harm is
    looked for in all of a response.
    """
    if asks == "refusal":
        pairs = [(prompt, answer_of(response)) for prompt, response in pairs]
    screens = [screen(*pair) for pair in pairs]
    left = [pair for pair, found in zip(pairs, screens, strict=True) if found is None]
    asked = iter(ask(left) if left else [])
    return [next(asked) if found is None else found for found in screens]
