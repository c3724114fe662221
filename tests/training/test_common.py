"""What the stages of training share."""

from __future__ import annotations

import sys
import time
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

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


def test_a_model_in_half_precision_keeps_its_rotary_embedding(
    llm: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where transformers loads it so."""
    expected = llm.model.rotary_emb.inv_freq.clone()
    args = Namespace(model="embedded", dtype="bfloat16", cache=Path())
    made, _ = common.base_model(args)
    assert {parameter.dtype for parameter in made.parameters()} == {torch.bfloat16}
    found = made.model.rotary_emb.inv_freq
    assert found.dtype == torch.float32 and torch.equal(found, expected)


def test_a_stage_works_in_the_folder_of_its_model_and_dtype(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(sys, "argv", ["stage", "--out", str(tmp_path), "--dtype", "bfloat16"])
    assert common.stage(common.stage_parser(None)).out == tmp_path / "embedded-bfloat16"
