"""Asks the engine for its status whenever somebody scrapes, and not more often than the engine should be bothered."""

import threading
import time

import zmq

from scheduler_service.engine.api_wire import Status
from scheduler_service.metrics.wire import decode_status, encode_query

_PATIENCE = 1.0  # seconds; a scraper waits for 10
_MIN_INTERVAL = 0.5  # seconds; scrapes that come faster share an answer


class EngineProbe:
    """The launcher's end of the engine's socket for api processes. Any thread may ask."""

    def __init__(self, endpoint: str) -> None:
        self._endpoint = endpoint
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._lock = threading.Lock()
        self._status: Status | None = None
        self._next_ask = 0.0

    def ask(self) -> Status | None:
        """The engine's status, at most half a second old; None when it does not answer."""
        with self._lock:
            if not self._context.closed and time.monotonic() >= self._next_ask:
                self._status = self._fetch()
                self._next_ask = time.monotonic() + _MIN_INTERVAL
            return self._status

    def close(self) -> None:
        """Ask no more."""
        with self._lock:
            self._context.term()

    def _fetch(self) -> Status | None:
        # A socket per question: an answer that comes too late has nowhere to go.
        with self._context.socket(zmq.DEALER) as socket:
            socket.setsockopt(zmq.LINGER, 0)
            socket.connect(self._endpoint)
            socket.send(encode_query())
            if not socket.poll(round(_PATIENCE * 1e3)):
                return None
            return decode_status(socket.recv())
