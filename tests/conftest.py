"""Shared fixtures: one tiny model of each architecture for the whole run."""

from collections.abc import Iterator
from functools import cache
from importlib.metadata import packages_distributions

import pytest
import torch
from hypothesis import settings

from tests import tiny
from tests.paths import ROOT

settings.register_profile("suite", max_examples=25, deadline=None, derandomize=True)
settings.load_profile("suite")
torch.set_num_threads(1)

# By minutes: begun last, one of them would leave the other worker with nothing to do. The two that
# need the embedded model do not begin at once, where it may have to be assembled first.
LONGEST = [
    "embedded/test_embedded.py",
    "test_recipes.py",
    "embedded/test_language_model.py",
    "evaluation/test_demonstration.py",
    "evaluation/harness/test_execution.py",
    "runtime/test_compiling.py",
    "bench/test_bench.py",
]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    order = {ROOT / "tests" / name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path, len(order)))


@pytest.fixture(scope="session")
def installed_read_once() -> Iterator[None]:
    """For each of its evaluations inspect looks up who installed the task: of a package that is
    installed as a link it finds that by the files of all packages, which takes a second."""
    with pytest.MonkeyPatch.context() as patch:
        name = "inspect_ai._util.package.packages_distributions"
        patch.setattr(name, cache(packages_distributions))
        yield


@pytest.fixture(scope="session")
def model():
    return tiny.llava()
