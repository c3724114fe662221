"""docs/cli.md is what the commands say of themselves."""

from __future__ import annotations

from tests import cli_reference


def test_the_committed_page_is_current() -> None:
    page = cli_reference.PAGE.read_text(encoding="utf-8")
    assert page == cli_reference.reference(), "python -m tests.cli_reference"
