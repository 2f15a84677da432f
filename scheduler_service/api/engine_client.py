"""This process's end of the socket to the engine."""

import asyncio
import itertools
import logging
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass

import grpc
import zmq

from scheduler_service.api import wire
from scheduler_service.api.errors import RequestError, invalid, overloaded, unavailable, waited_in_vain
from scheduler_service.api.messages import EngineLimits, Finish, ForwardAbort, Outcome, Outputs, Submission
from scheduler_service.api.streams import Inbox, OutputStream

_log = logging.getLogger("baton.api")

_TICK = 0.5  # seconds
_TICKS_PER_ATTACH = 2
_ATTACH_PATIENCE = 60.0  # seconds that the engine gets to come up
_FRAMES_PER_TURN = 256  # then other tasks get their turn
_MAX_FRAME_BYTES = 256 * 1024 * 1024


@dataclass(frozen=True)
class EngineListener:
    """Whom the engine's news concern. Called on the event loop; must not block."""

    limits: Callable[[EngineLimits], None]
    forward_abort: Callable[[ForwardAbort], object]


class EngineClient:
    """Hands requests to the engine and its tokens to their streams, on one event loop.

    The socket's file descriptor sits in the event loop itself: a frame costs a third of what zmq.asyncio takes. The
    descriptor is edge-triggered, so whoever touches the socket afterwards looks for frames that came meanwhile.

    Attributes:
        routing_id: names this process to the engine. A new one per process, as of executors: one that is started again
            must not get what was meant for its predecessor, whose handles were the same.
        limits: what the engine said last; zeros before it has spoken and after it is lost.
        lost: done once the engine is given up, with the reason. Final: the process has to end.
    """

    def __init__(self, endpoint: str, index: int, patience: float = 3.0, window: int = 4096) -> None:
        """Create a client.

        Args:
            endpoint: ZeroMQ endpoint of the engine's ROUTER.
            index: which api process this is.
            patience: seconds of the engine's silence after which it is given up.
            window: unread tokens of a stream above which the engine is told to hold it.
        """
        self.routing_id = f"api-{index}-{secrets.token_hex(8)}".encode()
        self.limits = EngineLimits()
        self.lost: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._endpoint = endpoint
        self._window = window
        self._silent_ticks_allowed = max(1, round(patience / _TICK))
        self._silent_ticks = 0
        self._attached = False
        self._streams: dict[int, OutputStream] = {}
        self._handles = itertools.count(1)
        self._query_ids = itertools.count(1)
        self._queries: dict[int, asyncio.Future[wire.ClusterStatus | wire.CommandResult]] = {}
        self._listener: EngineListener | None = None
        self._drain_scheduled = False
        self._ticker: asyncio.Task[None] | None = None
        self._context = zmq.Context(io_threads=1)
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.ROUTING_ID, self.routing_id)
        self._socket.setsockopt(zmq.LINGER, 100)
        # Live requests bound what can wait here; a full queue would silently lose tokens.
        self._socket.setsockopt(zmq.SNDHWM, 0)
        self._socket.setsockopt(zmq.RCVHWM, 0)
        self._socket.setsockopt(zmq.MAXMSGSIZE, _MAX_FRAME_BYTES)

    def start(self, listener: EngineListener) -> None:
        """Connect and introduce this process, again and again until the engine answers."""
        self._listener = listener
        self._socket.connect(self._endpoint)
        asyncio.get_running_loop().add_reader(self._socket.fileno(), self._drain)
        self._ticker = asyncio.create_task(self._tick())

    def close(self) -> None:
        """Leave the engine; idempotent."""
        if self._ticker is not None:
            self._ticker.cancel()
            self._ticker = None
            asyncio.get_running_loop().remove_reader(self._socket.fileno())
        self._socket.close()
        self._context.term()

    def open_stream(
        self, inbox: Inbox, *, resumed: int = 0, keep: bool = False, note_arrivals: bool = False
    ) -> OutputStream:
        """A stream with a handle of its own, not yet known to the engine; see OutputStream."""
        return OutputStream(next(self._handles), inbox, resumed=resumed, keep=keep, note_arrivals=note_arrivals)

    def submit(self, submission: Submission, stream: OutputStream) -> None:
        """Hand a request to the engine; its output goes to ``stream``.

        Raises:
            RequestError: UNAVAILABLE, the engine is lost.
        """
        if self.lost.done():
            raise unavailable("the scheduler's engine is lost")
        stream.submitted = True
        self._streams[stream.handle] = stream
        self._send(wire.encode_submit(submission))

    def abort(self, streams: list[OutputStream]) -> None:
        """Ask the engine to end requests; it answers with how far they came."""
        if streams and not self.lost.done():
            self._send(wire.encode_abort([stream.handle for stream in streams]))

    def release(self, stream: OutputStream) -> None:
        """The reader of a stream that is held has caught up."""
        stream.held = False
        if not self.lost.done():
            self._send(wire.encode_hold([], [stream.handle]))

    def forget(self, stream: OutputStream) -> None:
        """The caller has gone or has all: a request that the engine has not ended is aborted, its output dropped."""
        if self._streams.pop(stream.handle, None) is not None:
            self.abort([stream])

    def forward_abort(self, request_ids: list[str], taken_over_at: float | None = None) -> None:
        """Ask the other api processes to abort requests; see ForwardAbort."""
        if not self.lost.done():
            self._send(wire.encode_forward_abort(request_ids, taken_over_at))

    async def cluster_status(self, timeout: float) -> wire.ClusterStatus:
        """Ask the engine for the state of the cluster; ``timeout`` in seconds.

        Raises:
            RequestError: UNAVAILABLE, no answer in time.
        """
        answer = await self._ask(wire.encode_status_query, timeout)
        assert isinstance(answer, wire.ClusterStatus)
        return answer

    async def command(self, executor_id: str, action: wire.ExecutorAction, timeout: float) -> bool:
        """Pass an operator's order on; False if there is no such executor. ``timeout`` in seconds.

        Raises:
            RequestError: UNAVAILABLE, no answer in time.
        """
        answer = await self._ask(lambda query_id: wire.encode_command(query_id, executor_id, action), timeout)
        assert isinstance(answer, wire.CommandResult)
        return answer.known

    async def _ask(self, encode: Callable[[int], bytes], timeout: float) -> wire.ClusterStatus | wire.CommandResult:
        query_id = next(self._query_ids)
        answer: asyncio.Future[wire.ClusterStatus | wire.CommandResult]
        answer = asyncio.get_running_loop().create_future()
        self._queries[query_id] = answer
        try:
            if not self.lost.done():
                self._send(encode(query_id))
            return await asyncio.wait_for(answer, timeout)
        except TimeoutError:
            raise unavailable("the scheduler's engine does not answer") from None
        finally:
            del self._queries[query_id]

    def _send(self, frame: bytes) -> None:
        try:
            self._socket.send(frame, zmq.NOBLOCK)
        except zmq.ZMQError as error:
            self._lose(f"cannot send: {error}")
            return
        if not self._drain_scheduled and self._readable():
            self._drain_soon()

    def _readable(self) -> bool:
        return bool(int(self._socket.getsockopt(zmq.EVENTS)) & zmq.POLLIN)

    def _drain_soon(self) -> None:
        self._drain_scheduled = True
        asyncio.get_running_loop().call_soon(self._drain)

    def _drain(self) -> None:
        """Take in the frames that have come."""
        self._drain_scheduled = False
        try:
            for _ in range(_FRAMES_PER_TURN):
                if self._socket.closed or not self._readable():
                    return
                frame = self._socket.recv(zmq.NOBLOCK)
                self._silent_ticks = 0
                self._receive(wire.decode(frame))
        except Exception:
            # A frame that cannot be used may have held tokens: no stream can be trusted any more.
            _log.exception("bad frame from the engine")
            self._lose("bad frame")
            return
        self._drain_soon()

    def _receive(self, message: wire.FromEngine) -> None:
        if isinstance(message, Outputs):
            self._deliver(message)
        elif isinstance(message, EngineLimits):
            self._attached = True
            if message != self.limits and not self.lost.done():
                self._change_limits(message)
        elif isinstance(message, ForwardAbort):
            if self._listener is not None:
                self._listener.forward_abort(message)
        else:
            query = self._queries.get(message.query_id)
            if query is not None and not query.done():
                query.set_result(message)

    def _deliver(self, outputs: Outputs) -> None:
        now = time.monotonic()
        find, logprobs, window = self._streams.get, outputs.logprobs, self._window
        for item in outputs.prompt_logprobs:
            stream = find(item.handle)
            if stream is not None:
                stream.push_prompt(item.logprobs)
        for handle in outputs.best_effort_handles:
            stream = find(handle)
            if stream is not None:
                stream.mark_best_effort()
        full = []
        for index, (handle, token_id) in enumerate(zip(outputs.handles, outputs.token_ids, strict=True)):
            stream = find(handle)
            if stream is not None:
                unread = stream.push(token_id, now, logprobs.get(index) if logprobs else None)
                if unread > window and not stream.held and not stream.patient:
                    stream.held = True
                    full.append(handle)
        if full:
            self._send(wire.encode_hold(full, []))
        for handle, finish in outputs.finished:
            stream = self._streams.pop(handle, None)
            if stream is not None:
                _end(stream, finish)

    def _change_limits(self, limits: EngineLimits) -> None:
        self.limits = limits
        if self._listener is not None:
            self._listener.limits(limits)

    async def _tick(self) -> None:
        for tick in itertools.count():
            if not self._attached:
                if tick * _TICK >= _ATTACH_PATIENCE:
                    self._lose("it never answered")
                    return
                if tick % _TICKS_PER_ATTACH == 0:
                    self._send(wire.encode_attach())
            await asyncio.sleep(_TICK)
            # Silence is counted in turns of this loop, after reading: a stall of this process is not the engine's.
            self._drain()
            self._silent_ticks += self._attached
            if self._silent_ticks > self._silent_ticks_allowed:
                self._lose("silent for too long")
                return

    def _lose(self, reason: str) -> None:
        if self.lost.done():
            return
        self.lost.set_result(reason)
        self._change_limits(EngineLimits())
        for stream in self._streams.values():
            stream.fail(unavailable("the scheduler's engine is lost"))


def _end(stream: OutputStream, finish: Finish) -> None:
    match finish.outcome:
        case Outcome.STOP | Outcome.LENGTH | Outcome.ABORT:
            stream.finish(finish)
        case Outcome.REJECTED:
            stream.fail(invalid("", finish.message or "the request does not fit"))
        case Outcome.OVERLOADED:
            stream.fail(overloaded(finish.message or "the queue is full"))
        case Outcome.UNAVAILABLE:
            stream.fail(waited_in_vain(finish.message or "no executor is ready"))
        case Outcome.ERROR:
            stream.fail(RequestError(grpc.StatusCode.INTERNAL, "", finish.message or "the request failed"))
