"""Pages of studies name the code and the model that gave their numbers."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

import pytest

from tests import checkpoint
from vlm_safeguard.evaluation.studies import provenance as module
from vlm_safeguard.evaluation.studies.provenance import made_with, provenance
from vlm_safeguard.model.loading import load


def test_another_model_has_another_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "commit", lambda: "abc+")
    one, again, other = (
        provenance(load(checkpoint.save(tmp_path / name, seed=seed)))
        for name, seed in (("one", 0), ("again", 0), ("other", 1))
    )
    assert one == again
    assert (one["commit"], one["version"]) == ("abc+", version("vlm-safeguard"))
    changed = {name for name, value in other.items() if value != one[name]}
    assert changed == {"weights_sha256"}


@pytest.mark.parametrize(("commit", "begins"), [("abc", "commit `abc`, version 1"), (None, "ver")])
def test_the_commit_stands_where_there_is_one(commit: str | None, begins: str) -> None:
    keys = {"weights_sha256": "0123456789abcdef99", "template_sha256": "fedcba9876543210"}
    text = made_with({"commit": commit, "version": "1", **keys})
    assert text.startswith(begins)
    assert text.endswith("weights SHA-256 `0123456789abcdef`, chat template `fedcba9876543210`")
