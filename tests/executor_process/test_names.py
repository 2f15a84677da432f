"""Schedulers that are found by name: the link in this process, name resolution as the test says."""

import socket
from typing import Any

import pytest

from executor_service import endpoints
from executor_service.inbox import Inbox
from executor_service.link import Link
from executor_service.wire import Capacity
from tests.executor_process.scheduler_stub import SchedulerStub

CAPACITY = Capacity("e", "m", "f", "k", "cpu", "none", 100, 64, 4, 8, 4, 16)
NAME = "schedulers.test"


@pytest.fixture
def addresses(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the name stands for; looked up ten times a second."""
    found = ["127.0.0.1"]
    real = socket.getaddrinfo

    def getaddrinfo(host: Any, port: Any, *args: Any, **kwargs: Any) -> Any:
        if host != NAME:
            return real(host, port, *args, **kwargs)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, int(port))) for address in found]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    monkeypatch.setattr(endpoints, "_RESOLVE_INTERVAL", 0.1)
    return found


def test_a_name_stands_for_all_its_addresses_as_they_come_and_go(addresses: list[str]) -> None:
    first = SchedulerStub(scheduler_id="first")
    port = first.endpoint.rpartition(":")[2]
    second = SchedulerStub(f"tcp://127.0.0.2:{port}", scheduler_id="second")
    link = Link(f"tcp://{NAME}:{port}", "e", 7, Inbox())
    try:
        link.start(CAPACITY)
        first.receive("hello")
        addresses[:] = ["127.0.0.2"]  # the first one has left
        second.receive("hello")
        addresses[:] = ["127.0.0.1", "127.0.0.2"]
        first.answer_probes(executors=0)
    finally:
        link.close()
        first.close()
        second.close()
