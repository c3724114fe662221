"""Messages of several questions of the evaluation set."""

from __future__ import annotations

from bench.several_questions import KINDS, MESSAGES, messages
from vlm_safeguard.data import prompts


def test_messages_hold_the_questions_that_their_kind_says() -> None:
    items = prompts.evaluation("malicious")
    for harmful, harmless in KINDS.values():
        said = messages(harmful, harmless)
        assert len(said) == len(set(said)) == MESSAGES
        for text in said:
            labels = [p.label for p in items if p.prompt in text]
            assert labels.count("harmful") == harmful
            assert labels.count("harmless") == harmless
            assert not any(p.lookalike for p in items if p.prompt in text)
