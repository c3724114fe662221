"""Loading a model: code that comes with a checkpoint runs only when it is asked for."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest

from vlm_safeguard import load
from vlm_safeguard.errors import ModelError

CODE = """
from pathlib import Path
from transformers import PretrainedConfig
Path({marker!r}).touch()
class OwnConfig(PretrainedConfig):
    model_type = "of-its-own"
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkpoint with a configuration class of its own, and a user who says yes to anything."""
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 9))
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    facts = {"model_type": "of-its-own", "auto_map": {"AutoConfig": "own.OwnConfig"}}
    place = tmp_path / "checkpoint"
    place.mkdir()
    (place / "config.json").write_text(json.dumps(facts))
    (place / "own.py").write_text(CODE.format(marker=str(tmp_path / "ran")))
    return place


def test_code_that_comes_with_a_checkpoint_does_not_run(folder: Path) -> None:
    with pytest.raises(ModelError, match="trust_remote_code"):
        load(folder)
    assert not (folder.parent / "ran").exists()


def test_it_runs_where_it_is_trusted_by_name(folder: Path) -> None:
    with pytest.raises(ModelError, match="takes no images"):  # the class above has none
        load(folder, trust_remote_code=True)
    assert (folder.parent / "ran").exists()
