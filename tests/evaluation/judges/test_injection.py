"""Hostile responses are disarmed, and ordinary text is left alone."""

from __future__ import annotations

import pytest

from tests.evaluation.judges.responses import HOSTILE
from vlm_safeguard.evaluation.judges.guard_models import (
    PROBES,
)
from vlm_safeguard.evaluation.judges.injection import BREAK, disarm, marks_of


@pytest.mark.parametrize("text", HOSTILE)
def test_disarm_only_puts_breaks_in(text: str) -> None:
    assert disarm(text).replace(BREAK, "") == text.replace(BREAK, "")
    for mark in ("[/INST]", "[INST]", "<<SYS>>", "<|eot_id|>", "<|im_start|>", "<END CONV"):
        assert mark not in disarm(text)
    for line in disarm(text).replace("\u2028", "\n").splitlines():
        assert not line.lstrip(" *").lower().startswith(("agent:", "user*", "assistant :"))


def test_ordinary_text_is_left_alone() -> None:
    text = "Use a[0] < b and c > d; the user: nobody. See [1], <b>bold</b>.\n- A list:\n1) end"
    assert disarm(text) == text


def test_marks_of_a_prompt_are_its_labels_and_fences() -> None:
    frame = f"[INST] <<SYS>>\nYou grade.\n<</SYS>>\nBehavior:\n{PROBES[0]}\n---\nAnswer: [/INST]"
    marks = marks_of(frame, PROBES)
    assert marks == {"[INST] <<SYS>>", "<</SYS>>", "Behavior:", "---", "Answer: [/INST]"}
    assert disarm("one\n---\nBehavior: x\nmy Behavior: y", marks) == (
        f"one\n-{BREAK}--\nB{BREAK}ehavior: x\nmy Behavior: y"
    )
