"""A tiny guard, and its folder."""

import pytest

from tests import tiny
from tests.artifact.files import GATES


@pytest.fixture
def made(model):
    return tiny.guard(model, GATES, tokens=3)


@pytest.fixture
def folder(made, tmp_path):
    made.save_pretrained(tmp_path / "guard")
    return tmp_path / "guard"
