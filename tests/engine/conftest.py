"""An engine and its api process, for every test anew."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.engine.rig import Api, Engine


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Engine]:
    engine = Engine(tmp_path)
    yield engine
    engine.close()


@pytest.fixture
def api(engine: Engine) -> Iterator[Api]:
    api = Api(engine.api_endpoint)
    yield api
    api.close()
