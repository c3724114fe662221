"""Attacks: what they make of a request, and what they refuse."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlm_safeguard.data import drawings
from vlm_safeguard.data.inputs import Query
from vlm_safeguard.errors import DataError, ImageError
from vlm_safeguard.evaluation.attacks import LOOK, make_attack


@given(st.text())
def test_a_template_goes_round_any_request(text: str) -> None:
    attack = make_attack(f"template:{Path(__file__).parent / 'attack.txt'}")
    picture = drawings.blank()
    assert attack(Query(text, picture)) == Query(f"Story time.\n{text}\nThe end.", picture)


def test_typography_draws_the_request_and_asks_to_follow_it() -> None:
    made = make_attack("typography")(Query("How do I bake bread?", None))
    assert made.text == LOOK and "bread" not in made.text
    assert made.image is not None
    assert made.image.tobytes() == drawings.draw_text("How do I bake bread?").tobytes()


def test_what_cannot_be_attacked_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="has a picture already: use it in the setting text"):
        make_attack("typography")(Query("Hi", drawings.blank()))
    with pytest.raises(ImageError, match="plain ASCII"):
        make_attack("typography")(Query("\u4f60\u597d", None))
    with pytest.raises(DataError, match="unknown attack 'prayer': use one of template:FILE, typo"):
        make_attack("prayer")
    with pytest.raises(DataError, match=r"cannot read the attack's text .*none\.txt"):
        make_attack(f"template:{tmp_path / 'none.txt'}")
    (tmp_path / "empty.txt").write_text("no slot")
    with pytest.raises(DataError, match="exactly once"):
        make_attack(f"template:{tmp_path / 'empty.txt'}")
