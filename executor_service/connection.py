"""A DEALER socket to one scheduler, and what becomes of its connection."""

import logging

import zmq
from zmq.utils.monitor import recv_monitor_message

from executor_service.curve import CurveKeys
from executor_service.endpoints import EndpointError

logger = logging.getLogger(__name__)

_HIGH_WATER_MARK = 256
_MAX_FRAME_BYTES = 64 << 20
_MAX_FRAMES_PER_ROUND = 64
_RECONNECT_MS = 50
_RECONNECT_MAX_MS = 1000
_PING_MS = 500
_PONG_TIMEOUT_MS = 2000
_HANDSHAKE_FAILED = (
    zmq.EVENT_HANDSHAKE_FAILED_AUTH | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
)


class Connection:
    """Dials ``endpoint`` until closed; one thread at a time.

    Attributes:
        socket, monitor: for polling.
        broken_at: since when the connection is gone that once was there (``time.monotonic`` seconds), else None.
    """

    def __init__(
        self, context: "zmq.Context[zmq.Socket[bytes]]", endpoint: str, identity: bytes, keys: CurveKeys | None
    ) -> None:
        """Start dialling, encrypted if there are ``keys``.

        Raises:
            EndpointError: ``endpoint`` cannot be dialled.
            KeyFileError: a key is malformed.
        """
        self.endpoint = endpoint
        self.socket = _dealer(context, identity)
        self.socket.setsockopt(zmq.IPV6, "[" in endpoint)  # not for names: those might then lead to ::1 only
        self.broken_at: float | None = None
        self._is_refused = False
        if keys is not None:
            try:
                keys.protect(self.socket)
            except BaseException:
                self.socket.close()
                raise
        self.monitor = self.socket.get_monitor_socket(
            zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED | _HANDSHAKE_FAILED
        )
        try:
            self.socket.connect(endpoint)
        except zmq.ZMQError as error:
            self.close()
            raise EndpointError(f"cannot dial {endpoint!r}: {error}") from error

    def close(self) -> None:
        """Hang up; what still waits to be sent is dropped."""
        self.socket.disable_monitor()
        self.monitor.close()
        self.socket.close()

    def send(self, frame: bytes) -> bool:
        """Queue a frame; False when there is no connection, or the scheduler does not read."""
        try:
            self.socket.send(frame, zmq.NOBLOCK)
        except zmq.Again:
            return False
        return True

    def receive(self) -> list[bytes]:
        """What has arrived, a bounded number of frames."""
        frames = []
        for _ in range(_MAX_FRAMES_PER_ROUND):
            try:
                frames.append(self.socket.recv_multipart(zmq.NOBLOCK)[-1])
            except zmq.Again:
                break
        return frames

    def follow(self, now: float) -> None:
        """Take in one event of the monitor."""
        event = recv_monitor_message(self.monitor)["event"]
        if event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
            self._is_refused = False
            self.broken_at = None
            logger.info("connected to %s", self.endpoint)
        elif event & _HANDSHAKE_FAILED:
            if not self._is_refused:  # tried again and again; said once
                logger.error(
                    "%s does not take this executor's key, has another one than --scheduler-key, or none at all",
                    self.endpoint,
                )
            self._is_refused = True
        elif not self._is_refused:
            if self.broken_at is None:
                self.broken_at = now
            logger.warning("lost the connection to %s; reconnecting", self.endpoint)


def _dealer(context: "zmq.Context[zmq.Socket[bytes]]", identity: bytes) -> "zmq.Socket[bytes]":
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
