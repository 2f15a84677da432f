"""Skips without Node.js's packages: `make test-node` installs them."""

from pathlib import Path

import pytest

FOLDER = Path(__file__).parent
EXAMPLE = Path(__file__).parents[2] / "docs" / "examples" / "node"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if (EXAMPLE / "node_modules" / ".installed").exists():
        return
    for item in items:
        if FOLDER in item.path.parents:
            item.add_marker(pytest.mark.skip(reason="the example's packages are not installed: make test-node"))
