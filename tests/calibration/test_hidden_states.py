"""What is recorded of texts in odd letters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from vlm_safeguard.calibration import hidden_states
from vlm_safeguard.data.inputs import Query
from vlm_safeguard.utils.progress import Progress

ODD = "Bake b\u200bread?"


@pytest.fixture(autouse=True)
def signs_by_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """The intent is the length of a text, and the verdict is on what is not ASCII."""

    def record_with_logits(_: Any, asked: list[Query], *__: Any, **___: Any) -> Any:
        signs = [[float(len(one.text)), float(not one.text.isascii())] for one in asked]
        return torch.zeros(len(asked), 1, 1), torch.tensor(signs)

    monkeypatch.setattr(hidden_states, "record_with_logits", record_with_logits)


def test_the_verdict_on_odd_letters_is_that_of_their_canonical_form(tmp_path: Path) -> None:
    loaded: Any = None
    asked = [Query(text, None) for text in (ODD, "Ça va?")]
    _, signs = hidden_states.record_signs(loaded, asked, [1], tmp_path, "", Progress(quiet=True))
    assert signs is not None and signs.tolist() == [[len(ODD), 0], [6, 1]]


def test_the_canonical_form_is_another_reading(tmp_path: Path) -> None:
    """Also where sentences are not read one by one."""
    loaded: Any = None
    two = "Do I bake it? Or do I fry it?"
    quiet = Progress(quiet=True)
    for by_sentence, places in ((False, [[1, 0]]), (True, [[0, 0], [0, 1], [1, 2]])):
        found = hidden_states.record_readings(
            loaded, [two, ODD], by_sentence, [1], None, tmp_path, quiet
        )
        assert found.of.tolist() == places
        assert found.signs[-1].tolist() == [len(ODD) - 1, 0]
