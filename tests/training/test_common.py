"""What the stages of training share."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from training import common


def test_a_stage_says_what_it_took(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = iter([100.0, 100.0 + 3723.4])
    fake = SimpleNamespace(monotonic=lambda: next(clock), strftime=time.strftime)
    monkeypatch.setattr(common, "time", fake)
    with common.timed("projector"):
        pass
    said = capsys.readouterr()
    assert said.out == "" and said.err.endswith("] projector took 62 min 3 s\n")


def test_rows_are_written_all_or_none(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "rows.jsonl"
    common.write_jsonl(path, [{"text": "naïve"}, {"text": "two\nlines"}])
    assert common.read_jsonl(path) == [{"text": "naïve"}, {"text": "two\nlines"}]
    with pytest.raises(TypeError):
        common.write_jsonl(path, [{"text": object()}])
    assert len(common.read_jsonl(path)) == 2
