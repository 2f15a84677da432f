"""Outputs on their way to several api processes: each gets its own, whoever else has just gone."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import zmq

from baton_protos import engine_pb2 as pb
from baton_protos.columns import INT64, unpack
from scheduler_service.core.outputs import Outputs
from scheduler_service.engine.api_port import ApiPort
from scheduler_service.engine.sockets import bind_router

NAMES = (b"api-0", b"api-1")


class Processes:
    """Two api processes that are attached to a port."""

    def __init__(self, directory: Path) -> None:
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        endpoint = f"ipc://{directory / 'engine'}"
        self.port = ApiPort(bind_router(self.context, endpoint, 100))
        self.sockets = [self._connect(name, endpoint) for name in NAMES]
        for name in NAMES:
            self.port.socket.poll(5000)
            self.port.receive()
            self.port.attach(name)

    def _connect(self, name: bytes, endpoint: str) -> "zmq.Socket[bytes]":
        socket = self.context.socket(zmq.DEALER)
        socket.setsockopt(zmq.ROUTING_ID, name)
        socket.connect(endpoint)
        socket.send(pb.ToEngine(attach=pb.Attach()).SerializeToString())
        return socket

    def handle(self, name: bytes, own: int) -> int:
        peer = self.port.peer(name)
        assert peer is not None
        return peer.cluster_handle(own)

    def received(self, index: int, timeout: int) -> pb.OutputBatch | None:
        socket = self.sockets[index]
        return pb.FromEngine.FromString(socket.recv()).outputs if socket.poll(timeout) else None


@pytest.fixture
def processes(tmp_path: Path) -> Iterator[Processes]:
    processes = Processes(tmp_path)
    yield processes
    processes.context.destroy(linger=0)


def tokens(*handles: int, best_effort: tuple[int, ...] = ()) -> Outputs:
    column = np.array(handles, np.int64)
    return Outputs(column, np.arange(len(handles), dtype=np.int32), [], best_effort_handles=list(best_effort))


def test_the_last_process_does_not_get_what_was_anothers(processes: Processes) -> None:
    """Every process counts its handles from 1."""
    gone, there = (processes.handle(name, 7) for name in NAMES)
    processes.port.detach(NAMES[0], "it is gone")
    processes.port.deliver(tokens(gone))
    processes.port.deliver(tokens(gone, there))
    batch = processes.received(1, 5000)
    assert batch is not None
    assert unpack(batch.handles, INT64).tolist() == [7]
    assert unpack(batch.token_ids).tolist() == [1]
    assert processes.received(1, 100) is None


def test_a_process_learns_that_its_stream_is_not_exact_without_a_token_of_its_own(processes: Processes) -> None:
    other, mine = (processes.handle(name, 3) for name in NAMES)
    processes.port.deliver(tokens(other, best_effort=(mine,)))
    batch = processes.received(1, 5000)
    assert batch is not None
    assert unpack(batch.best_effort_handles, INT64).tolist() == [3]
    assert not batch.handles
