"""The IO thread: sole owner of the DEALER socket. It never waits for compute, so heartbeats flow during long steps."""

import contextlib
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable

import zmq
from zmq.utils.monitor import recv_monitor_message

from executor_service.inbox import Inbox, Stop
from executor_service.session import Session
from executor_service.step_plan import Fault, StepResult
from executor_service.wire import Capacity

logger = logging.getLogger(__name__)

EXIT_LINK_FAILED = 1

_HIGH_WATER_MARK = 256
_MAX_FRAME_BYTES = 64 << 20
_MAX_FRAMES_PER_ROUND = 64
_RECONNECT_MS = 50
_RECONNECT_MAX_MS = 1000
_PING_MS = 500
_PONG_TIMEOUT_MS = 2000
_JOIN_SECONDS = 0.5


class EndpointError(ValueError):
    """The scheduler's endpoint is not one that ZeroMQ can dial."""


class Link:
    """Connection to one scheduler. ``ready``, ``result`` and ``fault`` may be called from any thread and never wait."""

    def __init__(self, endpoint: str, executor_id: str, boot_id: int, inbox: Inbox) -> None:
        """Start dialling.

        Raises:
            EndpointError: ``endpoint`` cannot be dialled.
        """
        self._endpoint = endpoint
        self._boot_id = boot_id
        self._inbox = inbox
        self._context = zmq.Context()
        self._socket = _dealer(self._context, routing_id(executor_id, boot_id))
        try:
            self._socket.connect(endpoint)
        except zmq.ZMQError as error:
            self._context.destroy(linger=0)
            raise EndpointError(f"cannot dial {endpoint!r}: {error}") from error
        self._monitor = self._socket.get_monitor_socket(zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED)
        # bounded by what is in flight: at most two entries per plan, and plans are bounded by the inbox
        self._requests: deque[Callable[[float], None]] = deque()
        self._wake_reader, self._wake_writer = os.pipe()
        os.set_blocking(self._wake_writer, False)
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

    def close(self) -> None:
        """Stop talking; nothing that is still to be sent goes out."""
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
        self._socket.disable_monitor()
        self._context.destroy(linger=0)

    def _round(self) -> None:
        session = self._session
        self._flush()
        wait = max(0.0, session.deadline - time.monotonic())
        poller = zmq.Poller()
        poller.register(self._socket, zmq.POLLIN | zmq.POLLOUT if session.outgoing else zmq.POLLIN)
        poller.register(self._monitor, zmq.POLLIN)
        poller.register(self._wake_reader, zmq.POLLIN)
        events = dict(poller.poll(int(wait * 1e3) + 1))
        now = time.monotonic()
        # before anything is read: frames that waited while this process was frozen must not extend the session
        session.tick(now)
        if self._wake_reader in events:
            self._serve_requests(now)
        if self._monitor in events:
            self._log_connection()
        if events.get(self._socket, 0) & zmq.POLLIN:
            self._receive(now)

    def _serve_requests(self, now: float) -> None:
        os.read(self._wake_reader, 4096)
        while self._requests:
            self._requests.popleft()(now)

    def _receive(self, now: float) -> None:
        for _ in range(_MAX_FRAMES_PER_ROUND):
            try:
                parts = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            self._session.receive(parts[-1], now)

    def _flush(self) -> None:
        outgoing = self._session.outgoing
        while outgoing:
            try:
                self._socket.send(outgoing[0], zmq.NOBLOCK)
            except zmq.Again:  # not connected, or the scheduler does not read
                return
            outgoing.popleft()

    def _log_connection(self) -> None:
        event = recv_monitor_message(self._monitor)["event"]
        if event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
            logger.info("connected to %s", self._endpoint)
        else:
            logger.warning("lost the connection to %s; reconnecting", self._endpoint)


def routing_id(executor_id: str, boot_id: int) -> bytes:
    """The DEALER's identity: a new one per process, so that a restarted executor never inherits an old one's frames."""
    return executor_id.encode() + boot_id.to_bytes(8, "big")


def _dealer(context: zmq.Context[zmq.Socket[bytes]], identity: bytes) -> zmq.Socket[bytes]:
    socket = context.socket(zmq.DEALER)
    socket.setsockopt(zmq.ROUTING_ID, identity)
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.IMMEDIATE, 1)
    socket.setsockopt(zmq.SNDHWM, _HIGH_WATER_MARK)
    socket.setsockopt(zmq.RCVHWM, _HIGH_WATER_MARK)
    socket.setsockopt(zmq.RECONNECT_IVL, _RECONNECT_MS)
    socket.setsockopt(zmq.RECONNECT_IVL_MAX, _RECONNECT_MAX_MS)
    socket.setsockopt(zmq.MAXMSGSIZE, _MAX_FRAME_BYTES)
    # a peer that vanished without a word would otherwise hold the connection until TCP gives up, minutes later
    socket.setsockopt(zmq.HEARTBEAT_IVL, _PING_MS)
    socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, _PONG_TIMEOUT_MS)
    socket.setsockopt(zmq.HANDSHAKE_IVL, _PONG_TIMEOUT_MS)
    socket.setsockopt(zmq.CONNECT_TIMEOUT, _PONG_TIMEOUT_MS)
    return socket
