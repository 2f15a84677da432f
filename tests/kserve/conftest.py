"""A cluster, and tritonclient in an environment of its own."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from baton import Client, LocalCluster
from baton.checkpoints import TINY_PYTHON
from tests.e2e.harness import options
from tests.foreign import ForeignScript

VENV = Path(__file__).parents[2] / ".venv-kserve"
FOLDER = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if (VENV / ".installed").exists():
        return
    for item in items:
        if FOLDER in item.path.parents:
            item.add_marker(pytest.mark.skip(reason="tritonclient is not installed: make test-kserve"))


@pytest.fixture(scope="session")
def cluster() -> Iterator[LocalCluster]:
    with LocalCluster(options(TINY_PYTHON)) as running:
        yield running


@pytest.fixture
def client(cluster: LocalCluster) -> Iterator[Client]:
    with Client(cluster.address) as connected:
        yield connected


@pytest.fixture(scope="session")
def triton(cluster: LocalCluster) -> Iterator[ForeignScript]:
    with ForeignScript(VENV, FOLDER / "triton_client.py", cluster.address) as script:
        yield script
