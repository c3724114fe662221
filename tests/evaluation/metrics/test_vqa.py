"""The answer check of easy-vqa."""

from __future__ import annotations

import pytest

from vlm_safeguard.evaluation.metrics.vqa import vqa_answer


@pytest.mark.parametrize(
    ("reply", "answer", "right"),
    [
        ("It is a gray rectangle, so no.", "no", True),
        ("It is a gray rectangle, so no.", "yes", False),
        ("It is a circle.", "circle", True),
        ("It is a circle or a triangle.", "circle", False),
        ("It is red.", "red", True),
        ("I'm sorry, but I can't help with that.", "red", False),
        ("yes and no", "yes", False),
    ],
)
def test_easy_vqa_answers(reply: str, answer: str, right: bool) -> None:
    words = {"yes", "no", "circle", "rectangle", "triangle", "red", "gray", "blue"}
    assert vqa_answer(reply, answer, words) is right
