"""A tiny checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import checkpoint


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint.save(tmp_path_factory.mktemp("tiny"))
