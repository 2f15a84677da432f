"""The IO thread: sole owner of the sockets. It never waits for compute, so heartbeats flow during long steps."""

import contextlib
import logging
import math
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence

import zmq

from executor_service.connection import Connection
from executor_service.curve import CurveKeys, KeyFileError
from executor_service.endpoints import EndpointError, Resolver, is_name, parse, resolve
from executor_service.inbox import Inbox, Stop
from executor_service.scheduler_choice import SchedulerChoice
from executor_service.session import Session
from executor_service.step_plan import Fault, StepResult
from executor_service.wire import Capacity, decode_census

logger = logging.getLogger(__name__)

EXIT_LINK_FAILED = 1

# A scheduler whose connection broke and did not come back this soon is given up where there are others.
_BROKEN_SECONDS = 0.5
_JOIN_SECONDS = 0.5


class Link:
    """The way to one scheduler of a list. ``ready``, ``result``, ``fault`` and ``drain`` never wait; any thread may
    call them."""

    def __init__(
        self, schedulers: str, executor_id: str, boot_id: int, inbox: Inbox, keys: CurveKeys | None = None
    ) -> None:
        """Start dialling all of them, encrypted if there are ``keys``.

        Args:
            schedulers: endpoints separated by commas; a name stands for all its addresses.

        Raises:
            EndpointError: there is none, or one cannot be dialled.
            KeyFileError: a key is malformed.
        """
        self._boot_id = boot_id
        self._inbox = inbox
        self._identity = routing_id(executor_id, boot_id)
        self._keys = keys
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._poller = zmq.Poller()
        self._connections: dict[str, Connection] = {}
        named = parse(schedulers)
        if not named:
            raise EndpointError("no scheduler is named")
        endpoints = resolve(named)
        try:
            self._dial(endpoints)
        except (EndpointError, KeyFileError):
            self._context.destroy(linger=0)
            raise
        self._choice = SchedulerChoice(endpoints, boot_id)
        self._resolver = Resolver(named, self._redial) if any(map(is_name, named)) else None
        # bounded by what is in flight: at most two entries per plan, and plans are bounded by the inbox
        self._requests: deque[Callable[[float], None]] = deque()
        self._wake_reader, self._wake_writer = os.pipe()
        os.set_blocking(self._wake_writer, False)
        self._poller.register(self._wake_reader, zmq.POLLIN)
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="link", daemon=True)

    @property
    def session(self) -> Session:
        """What is being talked about; only to be looked at, and only once the link has started."""
        return self._session

    def start(self, capacity: Capacity) -> None:
        """Start talking: everything else comes after this."""
        self._session = Session(capacity, self._boot_id, self._inbox, time.monotonic())
        self._thread.start()
        if self._resolver is not None:
            self._resolver.start(tuple(self._connections))

    def close(self) -> None:
        """Stop talking; nothing that is still to be sent goes out."""
        if self._resolver is not None:
            self._resolver.close()
        if self._thread.ident is None:  # never started
            self._close_sockets()
            return
        self._closing = True
        self._wake()
        self._thread.join(_JOIN_SECONDS)

    def ready(self, epoch: int) -> None:
        """Say that ``epoch`` may begin."""
        self._request(lambda _: self._session.ready(epoch))

    def result(self, epoch: int, result: StepResult) -> None:
        """Send a step's result."""
        self._request(lambda now: self._session.result(epoch, result, now))

    def fault(self, epoch: int, fault: Fault) -> None:
        """Report that nothing more of ``epoch`` will be applied."""
        self._request(lambda now: self._session.fault(epoch, fault, now))

    def drain(self) -> None:
        """Hand all work over, then stop; the inbox tells when."""
        self._request(lambda _: self._session.drain())

    def _redial(self, endpoints: tuple[str, ...]) -> None:
        self._request(lambda _: self._replace(endpoints))

    def _request(self, request: Callable[[float], None]) -> None:
        self._requests.append(request)
        self._wake()

    def _wake(self) -> None:
        with contextlib.suppress(BlockingIOError):  # the pipe is full of wake-ups already
            os.write(self._wake_writer, b"\0")

    # ---------------------------------------------------------------- IO thread

    def _run(self) -> None:
        try:
            while not self._closing:
                self._round()
        except Exception as error:
            logger.exception("the link failed")
            self._inbox.stop(Stop(EXIT_LINK_FAILED, f"the link to the scheduler failed: {error}"))
        finally:
            self._close_sockets()

    def _close_sockets(self) -> None:
        for connection in self._connections.values():
            connection.close()
        self._context.destroy(linger=0)

    def _round(self) -> None:
        self._flush()
        wait = max(0.0, self._deadline(time.monotonic()) - time.monotonic())
        events = dict(self._poller.poll(int(wait * 1e3) + 1))
        now = time.monotonic()
        # before anything is read: frames that waited while this process was frozen must not extend the session
        was_connected = self._session.is_connected
        self._session.tick(now)
        if self._wake_reader in events:
            self._serve_requests(now)
        for connection in list(self._connections.values()):
            if connection.monitor in events:
                connection.follow(now)
            if events.get(connection.socket, 0) & zmq.POLLIN:
                self._receive(connection, now)
        self._choose(was_connected, now)

    def _deadline(self, now: float) -> float:
        session = self._session
        looks = session.is_connected or session.is_seeking(now)
        return min(session.deadline, self._choice.deadline if looks else math.inf, self._home_given_up_at())

    def _serve_requests(self, now: float) -> None:
        os.read(self._wake_reader, 4096)
        while self._requests:
            self._requests.popleft()(now)

    def _receive(self, connection: Connection, now: float) -> None:
        endpoint = connection.endpoint
        for frame in connection.receive():
            census = decode_census(frame) if self._choice.awaits(endpoint) else None
            if census is not None:
                self._choice.receive(endpoint, census, now)
            elif endpoint == self._choice.home:
                self._session.receive(frame, now)

    def _choose(self, was_connected: bool, now: float) -> None:
        """Which scheduler to talk to from now on."""
        session, choice = self._session, self._choice
        if session.is_connected and now >= self._home_given_up_at():
            session.lose(now, "its connection is gone")
        if session.is_seeking(now):
            if was_connected:
                choice.leave(now, session.take_redirect())
            choice.seek(now)
        elif session.is_connected and (starved := choice.look_around(now)) is not None:
            session.ask_to_move(starved)

    def _home_given_up_at(self) -> float:
        home = self._connections.get(self._choice.home or "")
        if home is None or home.broken_at is None or not self._session.is_connected:
            return math.inf
        if self._session.is_leaving:
            return home.broken_at
        return home.broken_at + _BROKEN_SECONDS if len(self._connections) > 1 else math.inf

    def _flush(self) -> None:
        probes = self._choice.outgoing
        while probes:
            endpoint, frame = probes.popleft()
            if endpoint in self._connections:  # who is not there now will be asked again
                self._connections[endpoint].send(frame)
        home, outgoing = self._connections.get(self._choice.home or ""), self._session.outgoing
        while home is not None and outgoing and home.send(outgoing[0]):
            outgoing.popleft()
        for connection in self._connections.values():
            waits = connection is home and len(outgoing) > 0
            self._poller.modify(connection.socket, zmq.POLLIN | zmq.POLLOUT if waits else zmq.POLLIN)

    def _replace(self, endpoints: Sequence[str]) -> None:
        """The names stand for other addresses now. The one we talk to stays until its session ends."""
        logger.info("schedulers: %s", ", ".join(endpoints))
        home = self._choice.home
        kept = [*endpoints, *([home] if home and home not in endpoints and self._session.is_connected else [])]
        for endpoint in set(self._connections) - set(kept):
            self._hang_up(endpoint)
        try:
            self._dial(kept)
        except EndpointError as error:
            logger.error("%s", error)
        self._choice.offer([endpoint for endpoint in kept if endpoint in self._connections])

    def _dial(self, endpoints: Sequence[str]) -> None:
        """Dial those that are not dialled yet; one that cannot be dialled is named once the others are."""
        problem: EndpointError | None = None
        for endpoint in endpoints:
            if endpoint in self._connections:
                continue
            try:
                connection = Connection(self._context, endpoint, self._identity, self._keys)
            except EndpointError as error:
                problem = problem or error
                continue
            self._connections[endpoint] = connection
            self._poller.register(connection.socket, zmq.POLLIN)
            self._poller.register(connection.monitor, zmq.POLLIN)
        if problem is not None:
            raise problem

    def _hang_up(self, endpoint: str) -> None:
        connection = self._connections.pop(endpoint)
        self._poller.unregister(connection.socket)
        self._poller.unregister(connection.monitor)
        connection.close()


def routing_id(executor_id: str, boot_id: int) -> bytes:
    """The DEALER's identity: a new one per process, so that a restarted executor never inherits an old one's frames."""
    return executor_id.encode() + boot_id.to_bytes(8, "big")
