"""The measured part of the card."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from training import measure, pictures
from vlm_safeguard.utils.progress import Progress
from vlm_safeguard.utils.stats import wilson


def test_an_emoji_is_named_by_whole_words_of_the_held_out_artist(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    names = ["cat", "polar bear", "pig"]
    held_out = next(n for n, artist in enumerate(pictures.ARTISTS) if artist.held_out)
    emoji = pictures.EmojiSet(
        torch.zeros(4, 4, pictures.SIDE, pictures.SIDE, dtype=torch.uint8),
        torch.tensor([0, 1, 2, 0]),
        torch.tensor([held_out] * 3 + [0]),
    )
    said = ["The picture shows a category.", "A Polar bear!", "It shows a pig."]

    def respond(loaded: Any, items: list, **_: Any) -> list[SimpleNamespace]:
        assert [item.image.size for item in items] == [(pictures.SIDE, pictures.SIDE)] * 3
        return [SimpleNamespace(text=text) for text in said]

    concepts = [pictures.Concept("animal", name, (name,)) for name in names]
    monkeypatch.setattr(pictures, "load_concepts", lambda: concepts)
    monkeypatch.setattr(pictures, "load_emoji", lambda *_: emoji)
    monkeypatch.setattr(measure, "respond", respond)
    assert measure.naming(None, Path(), Progress(quiet=True)) == wilson(2, 3)
