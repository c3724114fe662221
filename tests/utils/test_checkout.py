"""The commit of the checkout, and of no other project's."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from vlm_safeguard.utils import checkout


@pytest.fixture(autouse=True)
def asked_anew() -> Iterator[None]:
    checkout._is_ours.cache_clear()
    yield
    checkout._is_ours.cache_clear()


def project(folder: Path, *tracked: str) -> Path:
    """A repository with a commit of the files named; returns the place of the package's file."""

    def git(*words: str) -> None:
        who = ("-c", "user.name=a", "-c", "user.email=a@b.invalid")
        subprocess.run(["git", *who, *words], cwd=folder, check=True, capture_output=True)

    for name in ("module.py", *tracked):
        (folder / name).write_text("1\n")
    git("init")
    git("add", *tracked)
    git("commit", "--message", "First")
    return folder / "module.py"


def test_a_change_marks_the_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = project(tmp_path, "module.py")
    monkeypatch.setattr(checkout, "HERE", place)
    head = checkout.commit() or ""
    assert re.fullmatch("[0-9a-f]{10}", head)
    assert checkout.git("rev-parse", "--short=10", "HEAD") == head
    place.write_text("2\n")
    assert checkout.commit() == head + "+"


def test_the_commit_of_another_project_is_not_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The package lies in an environment inside the project's folder."""
    monkeypatch.setattr(checkout, "HERE", project(tmp_path, "other.py"))
    assert checkout.commit() is None


def test_without_git_there_is_no_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert checkout.commit() is None
