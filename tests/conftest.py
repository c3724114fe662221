"""Shared fixtures: one tiny model of each architecture for the whole run."""

import pytest
import torch
from hypothesis import settings

from tests import tiny

settings.register_profile("suite", max_examples=25, deadline=None)
settings.load_profile("suite")
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def model():
    return tiny.llava()
