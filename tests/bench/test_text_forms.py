"""Requests written in other letters, and the table of how often a gate opens on them."""

from __future__ import annotations

from bench.text_forms import FORMS, measured
from tests import families, tiny
from vlm_safeguard.data.prompts import evaluation
from vlm_safeguard.model.canonical_text import canonical_text
from vlm_safeguard.model.text_only import find_markup

TEXT = "How do I bake it?"


def test_forms() -> None:
    written = {name: write(TEXT) for name, write in FORMS.items()}
    assert written["zero-width spaces inside words"] == (
        "H\u200bo\u200bw d\u200bo I b\u200ba\u200bk\u200be i\u200bt?"
    )
    assert written["full-width letters"] == "Ｈｏｗ ｄｏ Ｉ ｂａｋｅ ｉｔ？"
    assert written["aLtErNaTiNg CaSe"] == "hOw dO I BaKe iT?"
    assert written["l337sp34k"] == "H0w d0 1 b4k3 17?"
    assert written["s p a c e d letters"].startswith("H o w   d o")
    read = {name: canonical_text(text) for name, text in written.items()}
    assert {name: text for name, text in read.items() if text != written[name]} == {
        "zero-width spaces inside words": TEXT,
        "full-width letters": TEXT,
        "s p a c e d letters": TEXT,
        "aLtErNaTiNg CaSe": "how do I bake it?",
        "l337sp34k": "How do 1 bake 17?",
    }


def test_hidden_letters_count_as_often_as_plain_ones_at_least() -> None:
    loaded = families.llava()
    made = tiny.guard(loaded.model, [tiny.gate("text", 1)], layers=[2])
    made = tiny.changed(made, markup=find_markup(loaded))
    prompts = evaluation("malicious")[::20]
    rows = [line.strip("| ").split(" | ") for line in measured(loaded, made, prompts).splitlines()]
    shares = {row[0]: [float(cell.split("%")[0]) for cell in row[1:]] for row in rows[2:]}
    assert list(shares) == list(FORMS)
    assert shares["plain"][0] == shares["plain"][1] and shares["plain"][2] == shares["plain"][3]
    for name in ("zero-width spaces inside words", "full-width letters"):
        for before, now, plain in zip(
            shares[name][::2], shares[name][1::2], shares["plain"][1::2], strict=True
        ):
            assert now >= max(before, plain)
