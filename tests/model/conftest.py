"""Each family of ``tests.families``, and its tiny model."""

from __future__ import annotations

import pytest

from tests.families import FAMILIES, Family
from tests.model.family_helpers import loaded_of
from vlm_safeguard.model.loading import LoadedModel


@pytest.fixture(params=FAMILIES)
def one(request: pytest.FixtureRequest) -> Family:
    return FAMILIES[request.param]


@pytest.fixture
def loaded(one: Family) -> LoadedModel:
    return loaded_of(one)
