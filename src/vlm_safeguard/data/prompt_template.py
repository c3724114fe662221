"""Prompt templates of defences and attacks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from vlm_safeguard.data.prompts import SLOT
from vlm_safeguard.errors import DataError


def template(text: str, file: Path | None, what: str) -> Callable[[str], str]:
    """A rewording that puts the request at ``[QUESTION]`` in ``text``, or in the text of ``file``.

    Raises:
        DataError: the file (``what``, for the message) cannot be read or does not hold
            ``[QUESTION]`` exactly once.
    """
    if file is not None:
        try:
            text = file.read_text("utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"cannot read {what} {file}: {error}") from error
        if text.count(SLOT) != 1:
            raise DataError(f"{file} must hold {SLOT} exactly once: the request goes in there")
    before, after = text.split(SLOT)
    return lambda request: before + request + after
