"""A tiny checkpoint and its guard, in folders: a text gate that always opens, one in the VLM that
never does."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from tests import checkpoint, tiny
from vlm_safeguard.guard import Guard
from vlm_safeguard.model.loading import LoadedModel, load
from vlm_safeguard.model.text_only import find_markup


@dataclass(frozen=True)
class Subject:
    """A model with its guard, loaded and as folders."""

    model: Path
    guard: Path
    loaded: LoadedModel
    artifact: Guard


@pytest.fixture(scope="package")
def subject(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    folder = tmp_path_factory.mktemp("playground")
    path = checkpoint.save(folder / "model")
    loaded = load(path)
    text = tiny.gate("text", 1, 3, threshold=-1e3, reads_probe=True)
    gates = [text, tiny.gate("vlm", 3, threshold=1e3)]
    # The markup of this processor, not of the token ids that other tests write by hand.
    artifact = tiny.changed(tiny.guard(loaded.model, gates), markup=find_markup(loaded))
    artifact.save_pretrained(folder / "guard")
    return Subject(path, folder / "guard", loaded, artifact)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Nothing goes into the user's cache."""
    monkeypatch.setenv("VLM_SAFEGUARD_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"
