"""Prompt templates of defences and attacks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from vlm_safeguard.data.prompts import SLOT
from vlm_safeguard.errors import DataError
from vlm_safeguard.utils.files import read_utf8


def template(text: str, file: Path | None, what: str) -> Callable[[str], str]:
    """A rewording that puts the request at ``[QUESTION]`` in ``text``, or in the text of ``file``.

    Raises:
        DataError: the file (``what``, for the message) cannot be read or does not hold
            ``[QUESTION]`` exactly once.
    """
    if file is not None:
        text = read_utf8(file, what).strip()
        if text.count(SLOT) != 1:
            raise DataError(f"{file} must hold {SLOT} exactly once: the request goes in there")
    before, after = text.split(SLOT)
    return lambda request: before + request + after
