"""gRPC without sockets: calls whose messages take their time, and are lost with their connection."""

import asyncio
import random
from collections import deque
from collections.abc import Callable
from typing import Any, NoReturn, Protocol

import grpc

from tests.simulation.clock import VirtualLoop
from tests.simulation.network import Pipe, Quality

_UNREAD_MESSAGES = 8  # what gRPC buffers of a stream that its reader leaves unread
_ABORT = "/baton.v1.Generation/Abort"
_GENERATE_STREAM = "/baton.v1.Generation/GenerateStream"

_End = grpc.aio.AioRpcError | None


class Server(Protocol):
    """What answers calls: an api process."""

    def begin(self, call: "Call", request: Any) -> None:
        """A call has arrived."""

    def abort(self, request: Any) -> None:
        """An Abort has arrived."""


class Transport(Protocol):
    """Where calls travel."""

    loop: VirtualLoop
    rng: random.Random
    caller_links: Quality

    def server(self, target: str) -> Server | None:
        """An api process that listens there."""

    def note_call(self, call: "Call") -> None:
        """A call has begun."""


class Channel:
    """What the SDK takes for a channel to ``target``."""

    def __init__(self, transport: Transport, target: str) -> None:
        self._transport = transport
        self._target = target

    def unary_unary(self, method: str, *_: object, **__: object) -> Callable[..., "Farewell"]:
        def send(request: Any, **_: object) -> Farewell:
            assert method == _ABORT
            return Farewell(self._transport, self._target, request)

        return send

    def unary_stream(self, method: str, *_: object, **__: object) -> Callable[..., "Call"]:
        def open_call(request: Any, **_: object) -> Call:
            assert method == _GENERATE_STREAM
            return Call(self._transport, self._target, request)

        return open_call


class Call:
    """One streaming call: what the client has of it, and behind it the server's ``context``."""

    def __init__(self, transport: Transport, target: str, request: Any) -> None:
        self.context = Context(self)
        self.server: Server | None = None
        self.handler: asyncio.Task[None] | None = None
        self.num_unread = 0  # messages on their way, or not read
        self._loop, self._rng = transport.loop, transport.rng
        self._transport = transport
        self._target = target
        self._messages: deque[Any] = deque()
        self._end: tuple[_End] | None = None
        self._reader: asyncio.Future[None] | None = None
        self._down = Pipe(self._loop, self._rng, transport.caller_links, self._arrive)
        self._up = Pipe(self._loop, self._rng, transport.caller_links, self._reach)
        self._up.send(request)
        transport.note_call(self)

    # ---------------------------------------------------------------- the client's side

    async def read(self) -> Any:
        while not self._messages and self._end is None:
            self._reader = self._loop.create_future()
            await self._reader
        if self._messages:
            self._read_one()
            return self._messages.popleft()
        assert self._end is not None
        if self._end[0] is not None:
            raise self._end[0]
        return grpc.aio.EOF

    def cancel(self) -> bool:
        """The client wants no more."""
        self._finish(error(grpc.StatusCode.CANCELLED, "Locally cancelled by application!"))
        self._loop.call_later(self._rng.uniform(0.0001, 0.001), self.abandon)
        return True

    def break_off(self) -> None:
        """The connection is gone: both sides hear of it, each in its own time."""
        self._down.cut(0.0)
        self._finish(error(grpc.StatusCode.UNAVAILABLE, "Socket closed"))
        self._loop.call_later(self._rng.uniform(0.0, 0.5), self.abandon)

    def hold(self) -> None:
        """Nothing arrives for a while, either way."""
        self._down.hold()
        self._up.hold()

    def heal(self) -> None:
        self._down.heal()
        self._up.heal()

    @property
    def has_ended(self) -> bool:
        return self._end is not None

    def _read_one(self) -> None:
        self.num_unread -= 1
        self.context.note_room()

    def _arrive(self, item: Any) -> None:
        if self._end is not None:
            return
        if isinstance(item, tuple):
            self._finish(item[0])
        else:
            self._messages.append(item)
            self._wake()

    def _finish(self, end: _End) -> None:
        if self._end is None:
            self._end = (end,)
            self._wake()

    def _wake(self) -> None:
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)

    # ---------------------------------------------------------------- the server's side

    def _reach(self, request: Any) -> None:
        if self._end is not None:
            return
        self.server = self._transport.server(self._target)
        if self.server is None:
            self._finish(error(grpc.StatusCode.UNAVAILABLE, "failed to connect to all addresses; last error: refused"))
        else:
            self.server.begin(self, request)

    def send(self, item: Any) -> None:
        """From the server: a message, or in a tuple how the call ends."""
        self.num_unread += 1
        self._down.send(item)

    def abandon(self) -> None:
        """The server hears that the client has gone."""
        if self.handler is not None:
            self.handler.cancel()


class Farewell:
    """An Abort whose answer nobody waits for."""

    def __init__(self, transport: Transport, target: str, request: Any) -> None:
        self._transport = transport
        self._target = target
        self._callbacks: list[Callable[[Farewell], object]] = []
        Pipe(transport.loop, transport.rng, transport.caller_links, self._reach).send(request)

    def add_done_callback(self, callback: "Callable[[Farewell], object]") -> None:
        self._callbacks.append(callback)

    def _reach(self, request: Any) -> None:
        server = self._transport.server(self._target)
        if server is not None:
            server.abort(request)
        for callback in self._callbacks:
            callback(self)


class Context:
    """The server's view of a call."""

    def __init__(self, call: Call) -> None:
        self._call = call
        self._waiter: asyncio.Future[None] | None = None

    def time_remaining(self) -> None:
        """Calls have no deadline of their own here."""

    async def write(self, message: Any) -> None:
        while self._call.num_unread >= _UNREAD_MESSAGES:
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        self._call.send(message)

    async def abort_with_status(self, status: Any) -> NoReturn:
        self._call.send((error(status.code, status.details, tuple(status.trailing_metadata or ())),))
        raise grpc.aio.AbortError

    async def abort(self, code: grpc.StatusCode, details: str) -> NoReturn:
        raise AssertionError(f"an api process has a bug: {code.name} {details}")

    def note_room(self) -> None:
        """The client has read."""
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


def error(code: grpc.StatusCode, details: str, trailing: tuple[Any, ...] = ()) -> grpc.aio.AioRpcError:
    """How a failed call ends for its client."""
    return grpc.aio.AioRpcError(code, grpc.aio.Metadata(), grpc.aio.Metadata(*trailing), details=details)
