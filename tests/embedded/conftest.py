"""The embedded VLM, assembled for real, and the guard that ships for it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests import assembled
from vlm_safeguard.guard import Guard
from vlm_safeguard.model.loading import LoadedModel, load


@pytest.fixture(scope="session")
def folder() -> Path:
    return assembled.embedded()


@pytest.fixture(scope="session")
def loaded(folder: Path) -> LoadedModel:
    torch.manual_seed(0)
    return load(folder)


@pytest.fixture(scope="session")
def guard() -> Guard:
    """The guard that ships."""
    return Guard.from_pretrained("embedded")
