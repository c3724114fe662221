"""The README's example in Python runs when pasted."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.paths import ROOT


@pytest.mark.embedded
def test_the_example_runs(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """``folder``: the model that the example assembles is here, or the test is skipped."""
    code = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text("utf-8"), re.DOTALL)
    assert len(code) == 1
    names: dict[str, object] = {}
    exec(code[0], names)
    said = capsys.readouterr().out
    assert said.endswith("False\n")  # a harmless request: no gate opens
    assert len(said.split()) > 10
