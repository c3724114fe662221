"""The folder of the embedded VLM, assembled once however many processes want it."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import pytest

from vlm_safeguard.embedded.assemble import assemble
from vlm_safeguard.errors import DemoError


def embedded() -> Path:
    """Skips the test where the language model's file is neither here nor to be had."""
    folder = _folder()
    if folder is None:
        pytest.skip("the language model's file is neither here nor to be had")
    return folder


@lru_cache
def _folder() -> Path | None:
    try:
        return assemble()
    except DemoError as error:
        if "could not fetch" in str(error):
            return None
        raise
