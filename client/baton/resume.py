"""Streams that outlive the schedulers they run on: a broken call is continued on the next endpoint."""

import asyncio
import threading
import time
from collections.abc import Iterator
from typing import Any

import grpc

from baton.endpoints import Endpoint, Endpoints
from baton.errors import DeadlineExceededError, error_from_call
from baton.stream_log import ResumePolicy, StreamLog
from baton_protos import generation_pb2 as pb

_FAREWELL_SECONDS = 1.0


class ResumingCall:
    """One stream for its reader, however many calls it takes.

    Attributes:
        interruptions: how often it was continued.
    """

    def __init__(
        self, endpoints: Endpoints, request: pb.GenerateRequest, timeout: float | None, policy: ResumePolicy
    ) -> None:
        """Open the first call. ``timeout``: seconds for the whole stream; None = no limit."""
        self._log = StreamLog(request, policy, len(endpoints))
        self._endpoints = endpoints
        self._turns = endpoints.in_turn()
        self._deadline = _deadline(timeout)
        self._cancelled = threading.Event()
        self._endpoint, self._call = self._open()

    @property
    def interruptions(self) -> int:
        return self._log.interruptions

    def __next__(self) -> pb.GenerateStreamResponse:
        """The next message.

        Raises:
            StopIteration: the stream has ended.
            BatonError: it failed for good, or was cancelled.
        """
        while True:
            try:
                response = self._log.add(next(self._call))
            except grpc.RpcError as error:
                if self._log.has_ended:
                    raise StopIteration from error  # it broke when there was nothing more to come
                self._go_on(error)
                continue
            self._endpoints.mark_good(self._endpoint)
            if response is not None:
                return response

    def cancel(self) -> None:
        """End the stream; from any thread, any number of times."""
        is_first = not self._cancelled.is_set()
        self._cancelled.set()
        self._call.cancel()
        if is_first and (farewell := self._log.farewell()) is not None:
            self._abort(farewell)

    def _abort(self, request: pb.AbortRequest) -> None:
        for endpoint in self._endpoints:  # after a break, several may hold the request
            abort = endpoint.stub.Abort.future
            try:
                call = abort(request, timeout=_FAREWELL_SECONDS, metadata=endpoint.metadata)
            except ValueError:  # the client was closed
                return
            self._endpoints.bid_farewell(call)

    def _go_on(self, error: grpc.RpcError) -> None:
        failure = error_from_call(error, self._endpoint.target)
        if self._cancelled.is_set():
            raise failure from error
        wait = self._log.broken(failure, error, time.monotonic())
        _check_deadline(self._deadline, wait)
        if self._cancelled.wait(wait):
            raise failure from error
        try:
            self._endpoint, self._call = self._open()
        except ValueError as closed:  # grpc's way to say that the client was closed meanwhile
            raise failure from closed
        if self._cancelled.is_set():  # meanwhile: nobody else has seen this call
            self._call.cancel()

    def _open(self) -> tuple[Endpoint, Any]:
        return _open(self._turns, self._log, self._deadline)


class AsyncResumingCall:
    """The asyncio twin of ``ResumingCall``."""

    def __init__(
        self, endpoints: Endpoints, request: pb.GenerateRequest, timeout: float | None, policy: ResumePolicy
    ) -> None:
        """Open the first call. ``timeout``: seconds for the whole stream; None = no limit."""
        self._log = StreamLog(request, policy, len(endpoints))
        self._endpoints = endpoints
        self._turns = endpoints.in_turn()
        self._deadline = _deadline(timeout)
        self._is_cancelled = False
        self._endpoint, self._call = _open(self._turns, self._log, self._deadline)

    @property
    def interruptions(self) -> int:
        """How often it was continued."""
        return self._log.interruptions

    async def read(self) -> Any:
        """The next message, or ``grpc.aio.EOF``.

        Raises:
            BatonError: the stream failed for good.
            asyncio.CancelledError: it, or the reading task, was cancelled.
        """
        while True:
            try:
                response = await self._call.read()
            except grpc.RpcError as error:
                if self._log.has_ended:
                    return grpc.aio.EOF  # it broke when there was nothing more to come
                await self._go_on(error)
                continue
            if response is grpc.aio.EOF:
                return response
            self._endpoints.mark_good(self._endpoint)
            if (news := self._log.add(response)) is not None:
                return news

    def cancel(self) -> None:
        """End the stream; any number of times."""
        is_first = not self._is_cancelled
        self._is_cancelled = True
        self._call.cancel()
        if is_first and (farewell := self._log.farewell()) is not None:
            self._abort(farewell)

    def _abort(self, request: pb.AbortRequest) -> None:
        for endpoint in self._endpoints:  # after a break, several may hold the request
            try:
                call = endpoint.stub.Abort(request, timeout=_FAREWELL_SECONDS, metadata=endpoint.metadata)
            except grpc.aio.UsageError:  # the client was closed
                return
            self._endpoints.bid_farewell(call)

    async def _go_on(self, error: grpc.RpcError) -> None:
        failure = error_from_call(error, self._endpoint.target)
        if self._is_cancelled:
            raise failure from error
        wait = self._log.broken(failure, error, time.monotonic())
        _check_deadline(self._deadline, wait)
        await asyncio.sleep(wait)
        if self._is_cancelled:
            raise failure from error
        try:
            self._endpoint, self._call = _open(self._turns, self._log, self._deadline)
        except grpc.aio.UsageError as closed:  # the client was closed meanwhile
            raise failure from closed


def _deadline(timeout: float | None) -> float | None:
    return None if timeout is None else time.monotonic() + timeout


def _check_deadline(deadline: float | None, wait: float) -> None:
    if deadline is not None and time.monotonic() + wait >= deadline:
        raise DeadlineExceededError("the timeout ran out while the stream was interrupted")


def _open(turns: Iterator[Endpoint], log: StreamLog, deadline: float | None) -> tuple[Endpoint, Any]:
    endpoint = next(turns)
    timeout = None if deadline is None else max(0.0, deadline - time.monotonic())
    return endpoint, endpoint.stub.GenerateStream(log.request(), timeout=timeout, metadata=endpoint.metadata)
