"""Many evaluations are run here."""

import pytest


@pytest.fixture(scope="session", autouse=True)
def _quick_lookups(installed_read_once: None) -> None: ...
