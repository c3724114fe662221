"""Conversations of questions of the evaluation set, and of follow-ups."""

from __future__ import annotations

from bench.later_turns import COUNT, kinds
from vlm_safeguard.data.prompts import CalibrationData
from vlm_safeguard.evaluation.studies.modality_gap.conditions import Talk, messages


def said(talk: Talk) -> list[str]:
    return [turn.text for turn in talk]


def test_the_last_turn_is_the_same_in_every_column() -> None:
    data = CalibrationData.packaged()
    known = {p.prompt for part in (data.fit, data.bound, data.held) for p in part}
    for name, (alone, later, pictured) in kinds().items():
        asked = [said(talk)[-1] for talk in alone]
        assert len(asked) == len(set(asked)) == COUNT and not known & set(asked), name
        for talks in (later, pictured):
            assert [said(talk)[-1] for talk in talks] == asked
            assert all([t.role for t in talk] == ["user", "assistant", "user"] for talk in talks)
        assert [said(talk) for talk in pictured] == [said(talk) for talk in later]
        shown = [[part["type"] for part in messages(talk)[0]["content"]] for talk in pictured]
        assert shown == [["image", "text"]] * COUNT
