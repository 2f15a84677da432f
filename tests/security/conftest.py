"""Keys, certificates and tokens as ``baton keys`` makes them."""

from pathlib import Path

import pytest

from baton.keys import KeyDirectory
from tests.api.conftest import checkpoint, engine, serve

__all__ = ["checkpoint", "engine", "foreign_keys", "keys", "serve"]  # fixtures of the api's tests, too


@pytest.fixture(scope="session")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Executors a and b; a certificate for this machine; a caller with one; two tenants. Not to be changed."""
    directory = tmp_path_factory.mktemp("keys") / "cluster"
    made = KeyDirectory(directory)
    for executor in ("a", "b"):
        made.executor(executor)
    made.server(["127.0.0.1", "localhost"], days=1)
    made.client("caller", days=1)
    for tenant in ("acme", "rival"):
        made.tenant(tenant)
    return directory


@pytest.fixture(scope="session")
def foreign_keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another cluster's."""
    directory = tmp_path_factory.mktemp("foreign") / "cluster"
    made = KeyDirectory(directory)
    made.executor("a")
    made.server(["127.0.0.1"], days=1)
    made.client("caller", days=1)
    made.tenant("acme")
    return directory
