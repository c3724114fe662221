"""The request of the demonstration that is told as its answers come."""

from __future__ import annotations

import pytest

from tests import tiny
from vlm_safeguard.calibration.generation import Response
from vlm_safeguard.data.inputs import SETTINGS, Setting, query
from vlm_safeguard.data.prompts import Prompt
from vlm_safeguard.evaluation.benchmarks import load_benchmark
from vlm_safeguard.evaluation.harness.engine import Answered
from vlm_safeguard.evaluation.one_request import OneRequest
from vlm_safeguard.guard import Guard

REFUSAL = "I'm sorry, but I can't help with that."
ANSWER = "Sure, here is a list of words that goes on for more than twelve of them."
CUT = "Sure, here is a list of words that goes on for more …"


@pytest.fixture(scope="module")
def guard() -> Guard:
    return tiny.guard(tiny.llava(), [tiny.gate("text", 2)])


@pytest.fixture(scope="module")
def prompts() -> list[Prompt]:
    return [p for p in load_benchmark("own_malicious", limit=3) if p.harmful]


def answered(prompt: Prompt, setting: Setting, guard: Guard | None, text: str) -> Answered:
    said = Response(text, tokens=9, truncated=False, fired=None)
    return query(prompt, setting), guard, said


def test_the_first_that_shows_the_gap_is_told_cell_by_cell(
    guard: Guard, prompts: list[Prompt]
) -> None:
    said: list[str] = []
    one = OneRequest(prompts, guard, said.append)
    first, second, third = prompts
    # The first is answered as text too, and the third answered later.
    one.hear([answered(first, s, None, ANSWER) for s in SETTINGS])
    one.hear([answered(second, "picture", None, ANSWER), answered(second, "text", None, REFUSAL)])
    assert said == []
    one.hear([answered(second, "blank", None, ANSWER)])
    assert said == [
        f"one request: {second.prompt}",
        f"  picture, unguarded: {CUT}",
        f"  text, unguarded: {REFUSAL}",
        f"  blank, unguarded: {CUT}",
    ]
    del said[:]
    one.hear([answered(third, s, None, REFUSAL if s == "text" else ANSWER) for s in SETTINGS])
    one.hear([answered(first, s, guard, REFUSAL) for s in SETTINGS])
    assert said == []
    one.hear([answered(second, s, guard, REFUSAL) for s in SETTINGS])
    assert said == [f"  {setting}, guarded: {REFUSAL}" for setting in SETTINGS]
    del said[:]
    one.hear([answered(second, "text", None, ANSWER)])  # by another set that has it too
    assert said == []
    assert one.summary() == {
        "prompt": second.prompt,
        "responses": {
            setting: {"unguarded": REFUSAL if setting == "text" else CUT, "guarded": REFUSAL}
            for setting in SETTINGS
        },
    }


def test_without_a_gap_it_is_the_first_prompt(guard: Guard, prompts: list[Prompt]) -> None:
    said: list[str] = []
    one = OneRequest(prompts, guard, said.append)
    for prompt in reversed(prompts):
        one.hear([answered(prompt, s, g, ANSWER) for s in SETTINGS for g in (None, guard)])
    assert said == []
    assert one.summary()["prompt"] == prompts[0].prompt
    assert one.summary()["responses"]["blank"] == {"unguarded": CUT, "guarded": CUT}


def test_other_guards_and_other_requests_are_not_looked_at(
    guard: Guard, prompts: list[Prompt]
) -> None:
    said: list[str] = []
    steering = guard.config.steering.model_copy(update={"alpha": guard.config.steering.alpha + 1})
    other = Guard(guard.config.model_copy(update={"steering": steering}), guard.tensors)
    one = OneRequest(prompts[:1], guard, said.append)
    for prompt in prompts:
        one.hear([answered(prompt, s, guard, REFUSAL) for s in SETTINGS])
        one.hear([answered(prompt, s, other, ANSWER) for s in SETTINGS])
        one.hear([answered(prompt, s, None, ANSWER) for s in SETTINGS])
    assert {row["guarded"] for row in one.summary()["responses"].values()} == {REFUSAL}
