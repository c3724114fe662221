"""One tiny checkpoint for all servers, and one server for the tests that leave it as it was."""

import pytest

from tests import checkpoint
from tests.server.live import serving


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return checkpoint.save(tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="session")
def shared(folder, tmp_path_factory):
    audit = tmp_path_factory.mktemp("audit") / "audit.jsonl"
    with serving(folder, audit, body_seconds=1.0, max_body=2_000_000) as server:
        yield server


@pytest.fixture
def live(shared):
    """The shared server. After each test nothing was served unguarded, and it still answers."""
    yield shared
    assert shared.idle()
    assert shared.chat("still there?", max_tokens=1).status_code == 200
    assert shared.witness.unguarded == 0
