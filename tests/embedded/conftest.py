"""The embedded VLM, assembled for real, and the guard that ships for it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from vlm_safeguard.embedded.assemble import assemble
from vlm_safeguard.errors import DemoError
from vlm_safeguard.guard import Guard
from vlm_safeguard.model.loading import LoadedModel, load


@pytest.fixture(scope="session")
def folder() -> Path:
    try:
        return assemble()
    except DemoError as error:
        if "could not fetch" in str(error):
            pytest.skip("the language model's file is neither here nor to be had")
        raise


@pytest.fixture(scope="session")
def loaded(folder: Path) -> LoadedModel:
    torch.manual_seed(0)
    return load(folder)


@pytest.fixture(scope="session")
def guard() -> Guard:
    """The guard that ships."""
    return Guard.from_pretrained("embedded")
