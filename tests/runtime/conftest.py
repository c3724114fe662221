"""Guards that open for some of the tiny prompts, and a tiny checkpoint."""

import pytest

from tests import checkpoint, tiny
from tests.reference import calibrated
from tests.tiny import TEXTS
from vlm_safeguard.model.loading import load


@pytest.fixture(scope="module")
def mixed(model):
    return calibrated(model, tiny.PROMPTS)


@pytest.fixture(scope="module")
def texts(model):
    return calibrated(model, TEXTS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return checkpoint.save(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def loaded(folder):
    return load(folder)
