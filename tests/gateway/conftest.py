"""The gateway in front of a cluster, as ``make run-gateway`` runs them, and clients in the gateway's environment."""

import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from baton import Client
from baton.checkpoints import TINY_PYTHON
from tests.foreign import ForeignScript

ROOT = Path(__file__).parents[2]
VENV = ROOT / ".venv-gateway"
FOLDER = Path(__file__).parent
SECONDS = 120


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if (VENV / ".tested").exists():
        return
    for item in items:
        if FOLDER in item.path.parents:
            item.add_marker(pytest.mark.skip(reason="the gateway is not installed: make test-gateway"))


@dataclass(frozen=True)
class Gateway:
    """A running gateway. ``grpc`` is the address of its cluster's own API; empty where somebody else runs that."""

    process: subprocess.Popen[str]
    url: str
    grpc: str
    model: str


@contextmanager
def running_gateway(*flags: str) -> Iterator[Gateway]:
    """``deploy/gateway/run.py`` on free ports, up to its words that it is ready."""
    program = ("deploy/gateway/run.py", "--gateway", str(VENV / "bin" / "smg"), "--http-port", "0")
    process = subprocess.Popen(
        [sys.executable, *program, *flags], cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stdout is not None
    grpc, ready = "", ""
    try:
        while not ready:
            line = process.stdout.readline()
            assert line, "it did not come up; its log is above"
            if line.startswith("cluster: grpc "):
                grpc = line.split()[-1]
            elif line.startswith("ready: "):
                ready = line
        _, url, _, model, _ = ready.replace(",", "").replace(";", "").split()
        yield Gateway(process, url, grpc, model)
    finally:
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=SECONDS)
    assert process.returncode == 0


@pytest.fixture(scope="session")
def gateway() -> Iterator[Gateway]:
    with running_gateway("--model", str(TINY_PYTHON), "--port", "0", "--threads", "1") as running:
        yield running


@pytest.fixture
def cluster(gateway: Gateway) -> Iterator[Client]:
    """The same cluster through Baton's own API."""
    with Client(gateway.grpc) as client:
        yield client


@pytest.fixture(scope="session")
def openai(gateway: Gateway) -> Iterator[ForeignScript]:
    with ForeignScript(VENV, FOLDER / "openai_client.py", gateway.url) as script:
        yield script


@pytest.fixture(scope="session")
def anthropic(gateway: Gateway) -> Iterator[ForeignScript]:
    with ForeignScript(VENV, FOLDER / "anthropic_client.py", gateway.url) as script:
        yield script
