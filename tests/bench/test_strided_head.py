"""The time of a model's head over a view with gaps."""

from __future__ import annotations

import sys

import pytest
import torch

from bench import strided_head


def test_it_prints_a_row_for_each_dtype(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)  # of all later tests too
    monkeypatch.setattr(sys, "argv", ["strided_head", "--rows=3", "--width=8", "--words=40"])
    strided_head.main()
    head, _, *rows = capsys.readouterr().out.splitlines()
    assert "Logits that differ" in head
    assert [row.split("|")[1].strip() for row in rows] == ["float32", "bfloat16"]
    assert all(float(row.split("|")[5]) < 0.1 for row in rows)
