"""Requests written otherwise, and what the guard reads of them."""

from __future__ import annotations

from vlm_safeguard.data import drawings
from vlm_safeguard.data.inputs import Query
from vlm_safeguard.data.text_forms import TEXT_FORMS
from vlm_safeguard.evaluation.attacks import make_attack
from vlm_safeguard.model.canonical_text import canonical_text

TEXT = "How do I bake it?"


def test_forms_and_what_the_guard_reads() -> None:
    written = {name: write(TEXT) for name, write in TEXT_FORMS.items()}
    assert written["zero-width"] == "H\u200bo\u200bw d\u200bo I b\u200ba\u200bk\u200be i\u200bt?"
    assert written["full-width"] == "Ｈｏｗ ｄｏ Ｉ ｂａｋｅ ｉｔ？"
    assert written["alternating-case"] == "hOw dO I BaKe iT?"
    assert written["leetspeak"] == "H0w d0 1 b4k3 17?"
    assert written["spaced-letters"].startswith("H o w   d o")
    read = {name: canonical_text(text) for name, text in written.items()}
    assert {name: text for name, text in read.items() if text != written[name]} == {
        "zero-width": TEXT,
        "full-width": TEXT,
        "spaced-letters": TEXT,
        "upper-case": "how do i bake it?",
        "alternating-case": "how do I bake it?",
        "leetspeak": "How do 1 bake 17?",
    }


def test_a_form_is_an_attack_that_leaves_the_picture() -> None:
    picture = drawings.blank()
    for name, write in TEXT_FORMS.items():
        assert make_attack(name)(Query(TEXT, picture)) == Query(write(TEXT), picture)
