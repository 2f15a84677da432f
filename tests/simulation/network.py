"""Links that delay, lose, repeat, hold and break, and the ZeroMQ sockets at their ends."""

import itertools
import random
import struct
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import zmq

from tests.simulation.clock import VirtualLoop

_INSTANT = 1e-9  # so that frames of a link arrive in the order in which they were sent


@dataclass
class Quality:
    """How bad links are at the moment; shares of frames, seconds."""

    loss: float = 0.0
    repetition: float = 0.0
    corruption: float = 0.0
    least_delay: float = 50e-6
    most_delay: float = 500e-6


class Pipe:
    """One direction of a link: first in, first out, as long as it does not break."""

    def __init__(
        self, loop: VirtualLoop, rng: random.Random, quality: Quality, deliver: Callable[[Any], object]
    ) -> None:
        self._loop = loop
        self._rng = rng
        self._quality = quality
        self._deliver = deliver
        self._last = 0.0
        self._held: list[Any] | None = None
        self._in_flight: dict[int, tuple[Any, Any]] = {}
        self._numbers = itertools.count()

    def send(self, item: Any) -> None:
        quality, rng = self._quality, self._rng
        if quality.loss and rng.random() < quality.loss:
            return
        if quality.corruption and isinstance(item, bytes) and rng.random() < quality.corruption:
            item = item[: rng.randrange(len(item))] if rng.random() < 0.7 else rng.randbytes(len(item))
        self._post(item)
        if quality.repetition and rng.random() < quality.repetition:
            self._post(item)

    def hold(self) -> None:
        """Nothing arrives until ``heal``, and nothing is lost."""
        if self._held is None:
            self._held = []

    def heal(self) -> None:
        held, self._held = self._held, None
        for item in held or ():
            self._deliver(item)

    def cut(self, survival: float) -> None:
        """The connection breaks. A share of what is under way comes after it was made anew, out of order."""
        items = [*(self._held or ()), *(item for item, _ in self._in_flight.values())]
        for _, handle in self._in_flight.values():
            handle.cancel()
        self._in_flight.clear()
        self._held = None
        self._rng.shuffle(items)
        for item in items:
            if self._rng.random() < survival:
                self._loop.call_later(self._rng.uniform(0.001, 0.2), self._deliver, item)

    def _post(self, item: Any) -> None:
        quality = self._quality
        delay = quality.least_delay + self._rng.random() * (quality.most_delay - quality.least_delay)
        self._last = max(self._last + _INSTANT, self._loop.time() + delay)
        number = next(self._numbers)
        self._in_flight[number] = item, self._loop.call_at(self._last, self._arrive, number)

    def _arrive(self, number: int) -> None:
        self._loop.num_events += 1
        item, _ = self._in_flight.pop(number)
        if self._held is not None:
            self._held.append(item)
        else:
            self._deliver(item)


class WaitingError(Exception):
    """An engine has nothing to read and would wait; ``seconds`` at most."""

    def __init__(self, seconds: float) -> None:
        super().__init__(f"{seconds:g} s")
        self.seconds = seconds


class Poller:
    """Never waits: it says how long it would have. ``is_due`` lets one call pass as if that time were over."""

    def __init__(self) -> None:
        self.is_due = True
        self._sockets: list[Router | Monitor] = []

    def register(self, socket: "Router | Monitor", events: int) -> None:
        self._sockets.append(socket)

    def poll(self, timeout: int) -> list[tuple["Router | Monitor", int]]:
        """
        Raises:
            WaitingError: nothing can be read, and it is not due either.
        """
        readable = [(socket, int(zmq.POLLIN)) for socket in self._sockets if socket.is_readable]
        if not readable and not self.is_due:
            raise WaitingError(timeout / 1e3)
        self.is_due = False
        return readable


class Monitor:
    """A ROUTER's monitor socket."""

    def __init__(self) -> None:
        self._events = 0

    @property
    def is_readable(self) -> bool:
        return self._events > 0

    def notify(self) -> None:
        self._events += 1

    def poll(self, timeout: int) -> int:
        return self._events

    def recv_multipart(self, flags: int = 0) -> list[bytes]:
        self._events -= 1
        return [struct.pack("=hi", zmq.EVENT_DISCONNECTED, 0), b"tcp://"]


class Router:
    """A ROUTER with ROUTER_MANDATORY. ``peers`` take what is sent to them."""

    def __init__(self, wake: Callable[[], object]) -> None:
        self.peers: dict[bytes, Callable[[bytes], object]] = {}
        self.monitor = Monitor()
        self._inbox: deque[tuple[bytes, bytes]] = deque()
        self._wake = wake

    @property
    def is_readable(self) -> bool:
        return len(self._inbox) > 0

    def deliver(self, routing_id: bytes, frame: bytes) -> None:
        self._inbox.append((routing_id, frame))
        self._wake()

    def forget(self, routing_id: bytes) -> None:
        """Its connection is gone, and that was noticed."""
        if self.peers.pop(routing_id, None) is not None:
            self.monitor.notify()
            self._wake()

    def get_monitor_socket(self, events: int) -> Monitor:
        return self.monitor

    def recv_multipart(self, flags: int = 0) -> tuple[bytes, bytes]:
        if not self._inbox:
            raise zmq.Again
        return self._inbox.popleft()

    def send_multipart(self, parts: tuple[bytes, bytes], flags: int = 0) -> None:
        peer = self.peers.get(parts[0])
        if peer is None:
            raise zmq.ZMQError(zmq.EHOSTUNREACH)
        peer(parts[1])


class Dealer:
    """The DEALER of an api process, whose engine is on the same machine: frames take their time and nothing else."""

    def __init__(self, network: "VirtualZmq") -> None:
        self.closed = False
        self._network = network
        self._number = next(network.numbers)
        self._inbox: deque[bytes] = deque()
        self._identity = b""
        self._to_engine: Pipe | None = None

    def setsockopt(self, option: int, value: Any) -> None:
        if option == zmq.ROUTING_ID:
            self._identity = value

    def getsockopt(self, option: int) -> int:
        return int(zmq.POLLIN) if self._inbox else 0

    def fileno(self) -> int:
        return self._number

    def connect(self, endpoint: str) -> None:
        network, router = self._network, self._network.routers[endpoint]
        self._to_engine = network.to_engine(endpoint, self._identity)
        router.peers[self._identity] = Pipe(network.loop, network.rng, Quality(), self._receive).send

    def send(self, frame: bytes, flags: int = 0) -> None:
        assert self._to_engine is not None
        if not self.closed:
            self._to_engine.send(frame)

    def recv(self, flags: int = 0) -> bytes:
        return self._inbox.popleft()

    def close(self) -> None:
        self.closed = True
        self._inbox.clear()

    def _receive(self, frame: bytes) -> None:
        reader = self._network.loop.readers.get(self._number)
        if not self.closed and reader is not None:
            self._inbox.append(frame)
            reader()


class VirtualZmq:
    """Stands in for the module ``zmq``: sockets are virtual, constants and errors are real."""

    def __init__(self, loop: VirtualLoop, rng: random.Random) -> None:
        self.loop = loop
        self.rng = rng
        self.routers: dict[str, Router] = {}
        self.numbers = itertools.count(1)
        self._to_engines: dict[tuple[str, bytes], Pipe] = {}

    def to_engine(self, endpoint: str, identity: bytes) -> Pipe:
        """The way to an engine: what a process has sent comes before what the one that takes its place sends."""
        pipe = self._to_engines.get((endpoint, identity))
        if pipe is None:
            router = self.routers[endpoint]
            pipe = Pipe(self.loop, self.rng, Quality(), lambda frame: router.deliver(identity, frame))
            self._to_engines[endpoint, identity] = pipe
        return pipe

    def __getattr__(self, name: str) -> Any:
        return getattr(zmq, name)

    def Context(self, io_threads: int = 1) -> "VirtualZmq":  # noqa: N802 - as in zmq
        return self

    def Poller(self) -> "Poller":  # noqa: N802 - as in zmq
        return Poller()

    def socket(self, kind: int) -> Dealer:
        return Dealer(self)

    def term(self) -> None:
        """A context's."""
