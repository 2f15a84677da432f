"""Sessions with executors: Hello, epochs, fencing, leases, resending. No sockets, no clock of its own."""

import hashlib
import logging
from collections import Counter, deque
from dataclasses import dataclass, field
from enum import Enum

from scheduler_service.core.inflight import MAX_RUN_AHEAD
from scheduler_service.core.scheduler import ExecutorCapacity
from scheduler_service.core.step_plan import StepPlan, StepResult
from scheduler_service.engine.executor_wire import (
    Fault,
    Header,
    Heartbeat,
    Hello,
    Ready,
    Welcome,
    WireError,
    decode,
    encode,
)

logger = logging.getLogger(__name__)

HEARTBEAT_INTERVAL = 0.25  # seconds
_MAX_EXECUTORS = 1024
_MAX_NAME = 128
_MAX_ROWS = 65_536
_MAX_TOKENS = 1 << 24
_MAX_BLOCKS = 1 << 30


class Loss(Enum):
    """What ended a session with an executor that took plans."""

    LEASE = "lease"  # it was silent for too long
    CONNECTION = "connection"
    RESTART = "restart"  # it asked for a new session
    FAULT = "fault"  # it reported that it cannot go on
    RESULT = "result"  # it answered what cannot be


@dataclass(frozen=True, slots=True)
class ExecutorJoined:
    """Takes plans from step 1 on."""

    executor_id: str
    hello: Hello
    capacity: ExecutorCapacity


@dataclass(frozen=True, slots=True)
class ExecutorLost:
    """Takes no more plans; what it had not answered is void."""

    executor_id: str
    reason: str


@dataclass(frozen=True, slots=True)
class StepFinished:
    """The result of the executor's oldest step in flight."""

    executor_id: str
    result: StepResult


Event = ExecutorJoined | ExecutorLost | StepFinished


@dataclass(frozen=True, slots=True)
class Outgoing:
    """A frame for the peer with this ZeroMQ routing id."""

    routing_id: bytes
    frame: bytes


@dataclass(slots=True)
class Session:
    """One epoch with one executor. ``unreceived`` are plans that the executor has not acknowledged, oldest first."""

    routing_id: bytes
    hello: Hello
    boot_id: int
    epoch: int
    last_heard: float
    is_ready: bool = False
    seq: int = 0
    dispatched: int = 0
    settled: int = 0
    unreceived: deque[tuple[int, bytes]] = field(default_factory=lambda: deque(maxlen=MAX_RUN_AHEAD))
    missing_since: tuple[int, int] = (0, 0)  # (received, dispatched) as of the heartbeat before


class ExecutorRegistry:
    """Knows every executor. Frames to send gather in ``outgoing``; all times are seconds of a steady clock."""

    def __init__(self, scheduler_id: str, lease: float) -> None:
        self.outgoing: deque[Outgoing] = deque()
        self.dropped: Counter[str] = Counter()  # frames, by reason
        self.losses: Counter[Loss] = Counter()
        self._scheduler_id = scheduler_id
        self._lease = lease
        self._sessions: dict[str, Session] = {}
        self._epochs: Counter[str] = Counter()
        self._model_fingerprint = ""
        self._kernel_fingerprint = ""
        self._next_heartbeat = 0.0

    @property
    def sessions(self) -> dict[str, Session]:
        """Sessions by executor id, those not yet ready included."""
        return self._sessions

    @property
    def fingerprint(self) -> str:
        """Model and kernels of the first executor that joined: where both are equal, streams continue exactly."""
        if not self._model_fingerprint:
            return ""
        return f"{self._model_fingerprint}-{hashlib.sha256(self._kernel_fingerprint.encode()).hexdigest()[:16]}"

    def receive(self, routing_id: bytes, frame: bytes, now: float) -> list[Event]:
        """Take in one frame; nothing in it is fatal."""
        try:
            header, body = decode(frame)
        except WireError as error:
            self._drop("malformed frame", str(error))
            return []
        if isinstance(body, Hello):
            return self._receive_hello(routing_id, header, body, now)
        session = self._session_of(routing_id, header)
        if session is None:
            self._drop("foreign frame")
            return []
        session.last_heard = now
        self._forget_received(session, header.acked)
        match body:
            case StepResult():
                return self._receive_result(session, body)
            case Heartbeat():
                self._resend_plans(session, body.last_step)
                return []
            case Ready():
                return self._receive_ready(session)
            case Fault():
                reason = f"{body.code} in step {body.step_id}: {body.message}"
                return self.lose(session.hello.executor_id, Loss.FAULT, reason)

    def dispatch(self, executor_id: str, plan: StepPlan) -> None:
        """Send a plan; it is kept until the executor has acknowledged it."""
        session = self._sessions[executor_id]
        frame = encode(self._header(session), plan)
        session.dispatched = plan.step_id
        session.unreceived.append((plan.step_id, frame))
        self.outgoing.append(Outgoing(session.routing_id, frame))

    def tick(self, now: float) -> list[Event]:
        """Send heartbeats when they are due; end the sessions whose lease has run out."""
        if now < self._next_heartbeat:
            return []
        self._next_heartbeat = now + HEARTBEAT_INTERVAL
        silent = [s for s in self._sessions.values() if now - s.last_heard > self._lease]
        events = [event for s in silent for event in self.lose(s.hello.executor_id, Loss.LEASE, "its lease ran out")]
        for session in self._sessions.values():
            if session.is_ready:
                self._send(session, Heartbeat(session.dispatched, session.settled))
        return events

    def unreachable(self, routing_id: bytes) -> list[Event]:
        """The socket knows no peer with this routing id any more."""
        for executor_id, session in self._sessions.items():
            if session.routing_id == routing_id:
                return self.lose(executor_id, Loss.CONNECTION, "its connection is gone")
        return []

    def lose(self, executor_id: str, loss: Loss, reason: str) -> list[Event]:
        """End a session; ``reason`` is for a person. An event only if the executor took plans."""
        session = self._sessions.pop(executor_id, None)
        if session is None or not session.is_ready:
            return []
        self.losses[loss] += 1
        return [ExecutorLost(executor_id, reason)]

    # -------------------------------------------------------------------- Hello

    def _receive_hello(self, routing_id: bytes, header: Header, hello: Hello, now: float) -> list[Event]:
        known = self._sessions.get(hello.executor_id)
        if known is not None and known.boot_id == header.boot_id and known.hello.nonce == hello.nonce:
            known.last_heard = now
            self._send(known, self._welcome(hello, ""))
            return []
        reason = self._objection(hello)
        events = [] if reason else self.lose(hello.executor_id, Loss.RESTART, "it started anew")
        if not reason:
            self._epochs[hello.executor_id] += 1
        session = Session(routing_id, hello, header.boot_id, self._epochs[hello.executor_id], now)
        if reason:
            logger.warning("refused executor %.128r: %s", hello.executor_id, reason)
        else:
            self._sessions[hello.executor_id] = session
        self._send(session, self._welcome(hello, reason))
        return events

    def _objection(self, hello: Hello) -> str:
        """Why an executor cannot be used; empty if it can."""
        limits = (
            ("block_size", hello.block_size, 1, 4096),
            ("num_blocks", hello.num_blocks, 1, _MAX_BLOCKS),
            ("max_rows", hello.max_rows, 1, _MAX_ROWS),
            ("max_batched_tokens", hello.max_batched_tokens, hello.max_rows, _MAX_TOKENS),
            ("max_model_len", hello.max_model_len, 2, _MAX_TOKENS),
            ("vocab_size", hello.vocab_size, 1, _MAX_TOKENS),
        )
        for name, value, least, most in limits:
            if not least <= value <= most:
                return f"{name} is {value}, must be {least} to {most}"
        if not 1 <= len(hello.executor_id) <= _MAX_NAME:
            return f"executor_id must have 1 to {_MAX_NAME} characters"
        if hello.executor_id not in self._sessions and len(self._sessions) >= _MAX_EXECUTORS:
            return f"there are already {_MAX_EXECUTORS} executors"
        if self._model_fingerprint and hello.model_fingerprint != self._model_fingerprint:
            return (
                f"its model {hello.model} ({hello.model_fingerprint[:12]}) is not the cluster's "
                f"({self._model_fingerprint[:12]})"
            )
        return ""

    def _welcome(self, hello: Hello, reason: str) -> Welcome:
        return Welcome(hello.nonce, reason, round(HEARTBEAT_INTERVAL * 1e3), round(self._lease * 1e3))

    def _receive_ready(self, session: Session) -> list[Event]:
        if session.is_ready:
            return []
        session.is_ready = True
        hello = session.hello
        if not self._model_fingerprint:
            self._model_fingerprint, self._kernel_fingerprint = hello.model_fingerprint, hello.kernel_fingerprint
        if hello.kernel_fingerprint != self._kernel_fingerprint:
            logger.warning(
                "%s computes with other kernels (%s) than the first executor (%s): streams that move between them may "
                "differ in rounding",
                hello.executor_id,
                hello.kernel_fingerprint,
                self._kernel_fingerprint,
            )
        capacity = ExecutorCapacity(
            block_size=hello.block_size,
            num_blocks=hello.num_blocks,
            max_rows=hello.max_rows,
            max_batched_tokens=hello.max_batched_tokens,
            max_model_len=hello.max_model_len,
            vocab_size=hello.vocab_size,
        )
        return [ExecutorJoined(hello.executor_id, hello, capacity)]

    # -------------------------------------------------------------------- steps

    def _receive_result(self, session: Session, result: StepResult) -> list[Event]:
        if result.step_id != session.settled + 1:
            self._drop("repeated result" if result.step_id <= session.settled else "result after a gap")
            return []
        session.settled = result.step_id
        return [StepFinished(session.hello.executor_id, result)]

    def _forget_received(self, session: Session, received: int) -> None:
        while session.unreceived and session.unreceived[0][0] <= received:
            session.unreceived.popleft()

    def _resend_plans(self, session: Session, received: int) -> None:
        """Send plans again that were sent before the previous heartbeat and still have not arrived."""
        before, sent_before = session.missing_since
        if received == before and received < sent_before:
            for _, frame in session.unreceived:
                self.outgoing.append(Outgoing(session.routing_id, frame))
        session.missing_since = (received, session.dispatched)

    # ------------------------------------------------------------------- frames

    def _session_of(self, routing_id: bytes, header: Header) -> Session | None:
        """Fencing: the session that a frame belongs to, by scheduler, incarnation and epoch."""
        if header.scheduler_id != self._scheduler_id:
            return None
        for session in self._sessions.values():
            if session.routing_id == routing_id:
                return session if (session.boot_id, session.epoch) == (header.boot_id, header.epoch) else None
        return None

    def _header(self, session: Session) -> Header:
        session.seq += 1
        return Header(self._scheduler_id, session.boot_id, session.epoch, session.seq, session.settled)

    def _send(self, session: Session, body: Welcome | Heartbeat) -> None:
        self.outgoing.append(Outgoing(session.routing_id, encode(self._header(session), body)))

    def _drop(self, reason: str, detail: str = "") -> None:
        self.dropped[reason] += 1
        if self.dropped[reason] == 1:
            logger.warning("dropped a frame from an executor: %s%s", reason, detail and f": {detail}")
