"""Schedulers that are found by name: the link in this process, name resolution as the test says."""

import socket
import threading
from typing import Any

import pytest
import zmq

from executor_service import endpoints
from executor_service.connection import Connection
from executor_service.endpoints import EndpointError
from executor_service.inbox import Inbox
from executor_service.link import Link
from executor_service.wire import Capacity
from scheduler_service.engine.sockets import bind_router, bound_endpoint
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
        family = {True: socket.AF_INET6, False: socket.AF_INET}
        return [(family[":" in address], socket.SOCK_STREAM, 6, "", (address, int(port))) for address in found]

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
        first.receive("probe")
    finally:
        link.close()
        first.close()
        second.close()


def test_addresses_of_one_family_are_dialled(addresses: list[str]) -> None:
    """Else a scheduler with two families would have two connections from one identity, and drop one for the other."""
    addresses[:] = ["fd00::1", "127.0.0.1"]
    assert endpoints.resolve([f"tcp://{NAME}:5"]) == ("tcp://127.0.0.1:5",)
    addresses[:] = ["fd00::1", "fd00::2"]
    assert endpoints.resolve([f"tcp://{NAME}:5"]) == ("tcp://[fd00::1]:5", "tcp://[fd00::2]:5")


@pytest.mark.skipif(not socket.has_ipv6, reason="there is no IPv6")
def test_a_scheduler_is_reached_by_its_ipv6_address() -> None:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    router = bind_router(context, "tcp://[::1]:0", 10)
    link = Link(bound_endpoint(router), "e", 7, Inbox())
    try:
        link.start(CAPACITY)
        assert router.poll(5000)
    finally:
        link.close()
        context.destroy(linger=0)


def test_an_endpoint_that_cannot_be_dialled_does_not_keep_others_from_being_dialled() -> None:
    link = Link("tcp://127.0.0.1:1", "e", 7, Inbox())
    try:
        with pytest.raises(EndpointError, match="no-transport"):
            link._dial(("no-transport://x", "tcp://127.0.0.1:2"))
        assert list(link._connections) == ["tcp://127.0.0.1:1", "tcp://127.0.0.1:2"]
    finally:
        link.close()


def test_an_endpoint_that_cannot_be_dialled_leaves_no_socket_behind() -> None:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    with pytest.raises(EndpointError) as caught:
        Connection(context, "no-transport://x", b"e", None)
    ending = threading.Thread(target=context.term, daemon=True)  # returns when all sockets are closed
    ending.start()
    ending.join(5)
    assert not ending.is_alive(), caught  # whose frames have kept the socket from the garbage collector
