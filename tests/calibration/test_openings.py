"""Learning the tokens that refusals begin with."""

from typing import Any, cast

import pytest
import torch

from vlm_safeguard.calibration import openings
from vlm_safeguard.calibration.generation import Response
from vlm_safeguard.calibration.recognition import BY_PHRASES, ByTokens, contrasting
from vlm_safeguard.data.inputs import Query
from vlm_safeguard.utils.progress import Progress

REFUSAL, ANSWER = "As an AI language model, I cannot help with that.", "As you like it."


def test_openings_begin_refusals_and_hardly_any_answer() -> None:
    harmful = torch.tensor([7] * 60 + [9] * 20 + [4] * 18 + [5] * 2)
    harmless = torch.tensor([7] * 10 + [9] * 20 + [4] * 70)
    assert contrasting(harmful, harmless) == [7]  # 9 begins as many answers, 5 is too rare
    assert contrasting(harmless, harmless) == []


@pytest.mark.parametrize(("refuse", "found"), [(0, [7]), (5, [7]), (6, [7, 9]), (18, [7, 9])])
def test_a_token_of_refusals_and_answers_is_an_opening_if_a_third_are_refusals(
    monkeypatch: pytest.MonkeyPatch, refuse: int, found: list[int]
) -> None:
    """9 begins as many answers to harmful anchors as to harmless ones, 18 in all."""
    first = torch.tensor([7] * 40 + [9] * 9 + [4] * 51 + [9] * 9 + [4] * 84 + [5] * 7)
    asked = [Query(f"question {n}", None) for n in range(200)]
    nines = [n for n in range(200) if first[n] == 9]
    heard: list[str] = []

    def ask(_: Any, __: None, chosen: list[Query], *___: Any, **____: Any) -> list[Response]:
        heard.extend(one.text for one in chosen)
        texts = {asked[n].text: REFUSAL for n in nines[:refuse]}
        return [Response(texts.get(one.text, ANSWER), 9, True, None, first=9) for one in chosen]

    monkeypatch.setattr(openings, "ask", ask)
    monkeypatch.setattr(openings, "ASKED", 18)
    loaded = cast(Any, None)
    made = openings.learn_openings(loaded, asked, first, BY_PHRASES, Progress(quiet=True))
    assert made == found
    # 7 is known without, 5 begins too few answers, and 4 nearly all that are harmless.
    assert heard == [asked[n].text for n in nines]


def test_no_more_answers_are_asked_for_than_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    first, heard = torch.tensor([7] * 100 + [9] * 60 + [4] * 600 + [9] * 40), []

    def ask(_: Any, __: None, chosen: list[Query], *___: Any, **____: Any) -> list[Response]:
        heard.extend(int(one.text) for one in chosen)
        return [Response(ANSWER, 9, True, None, first=9)] * len(chosen)

    monkeypatch.setattr(openings, "ask", ask)
    asked, loaded = [Query(str(n), None) for n in range(800)], cast(Any, None)
    made = openings.learn_openings(loaded, asked, first, BY_PHRASES, Progress(quiet=True))
    assert made == [7]
    assert len(heard) == openings.ASKED and min(heard) == 100 and max(heard) > 760


@pytest.mark.parametrize(("likely", "found"), [(0.9, [7, 9]), (0.1, [7])])
def test_refusals_may_be_recognised_by_their_tokens(
    monkeypatch: pytest.MonkeyPatch, likely: float, found: list[int]
) -> None:
    first = torch.tensor([7] * 40 + [9] * 9 + [4] * 51 + [9] * 9 + [4] * 91)
    asked, loaded = [Query(str(n), None) for n in range(200)], cast(Any, None)
    said = Response(ANSWER, 9, True, None, first=9, opening=likely)
    monkeypatch.setattr(openings, "ask", lambda _, __, chosen, *___, **____: [said] * len(chosen))
    made = openings.learn_openings(loaded, asked, first, ByTokens((7,)), Progress(quiet=True))
    assert made == found


def test_an_answer_that_begins_otherwise_tells_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where a repetition penalty changes what is said first."""
    first = torch.tensor([7] * 40 + [9] * 9 + [4] * 51 + [9] * 9 + [4] * 91)
    asked, loaded = [Query(str(n), None) for n in range(200)], cast(Any, None)
    said = Response(REFUSAL, 9, True, None, first=7)
    monkeypatch.setattr(openings, "ask", lambda _, __, chosen, *___, **____: [said] * len(chosen))
    made = openings.learn_openings(loaded, asked, first, BY_PHRASES, Progress(quiet=True))
    assert made == [7]
