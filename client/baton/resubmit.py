"""Unary requests that outlive the schedulers they run on: a lost one is sent again, to the next endpoint."""

import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import grpc

from baton.endpoints import Endpoints
from baton.stream_log import is_pushed_back
from baton_protos import generation_pb2 as pb


class ResubmittedCall:
    """One answer for its reader, however many calls it takes. It has the part of a gRPC future that is needed.

    Nothing of an answer has been seen when a call is lost, so whichever comes first is the one. Each endpoint is tried
    once, after gRPC's own tries.
    """

    def __init__(self, endpoints: Endpoints, request: pb.GenerateRequest, timeout: float | None) -> None:
        """Send it. ``timeout``: seconds for all calls together; None = no limit."""
        self._request = request
        self._deadline = None if timeout is None else time.monotonic() + timeout
        self._turns = endpoints.in_turn()
        self._tries_left = len(endpoints)
        self._lock = threading.Lock()
        self._callbacks: list[Callable[[object], object]] = []
        self._done = threading.Event()
        self._is_cancelled = False
        self._submit()

    @property
    def target(self) -> str:
        """Where it was sent last."""
        return self._endpoint.target

    def result(self) -> Any:
        """Wait for the answer; raises what the last call raises."""
        self._done.wait()
        return self._call.result()

    def add_done_callback(self, callback: Callable[[object], object]) -> None:
        """Call ``callback`` with this once the answer is there: from another thread, or here and now."""
        with self._lock:
            if not self._done.is_set():
                self._callbacks.append(callback)
                return
        callback(self)

    def cancel(self) -> None:
        """End the request; from any thread, any number of times."""
        with self._lock:
            self._is_cancelled = True
            call = self._call
        call.cancel()

    def _submit(self) -> None:
        self._tries_left -= 1
        self._endpoint = next(self._turns)
        timeout = None if self._deadline is None else max(0.0, self._deadline - time.monotonic())
        call = self._endpoint.stub.Generate.future(self._request, timeout=timeout, metadata=self._endpoint.metadata)
        with self._lock:
            self._call = call
            is_cancelled = self._is_cancelled
        call.add_done_callback(self._finished)
        if is_cancelled:  # meanwhile: nobody else has seen this call
            call.cancel()

    def _finished(self, call: Any) -> None:
        lost = call.code() is grpc.StatusCode.UNAVAILABLE and not is_pushed_back(call)
        if lost and self._tries_left and not self._is_cancelled:
            with suppress(ValueError):  # the client was closed meanwhile: this is the answer, then
                self._submit()
                return
        with self._lock:
            self._done.set()
            callbacks, self._callbacks = self._callbacks, []
        for callback in callbacks:
            callback(self)
