"""Sessions with executors: Hello, epochs, fencing, leases, resending. No sockets, no clock of its own."""

import hashlib
import logging
from collections import Counter, deque

from scheduler_service.core.scheduler import ExecutorCapacity
from scheduler_service.core.step_plan import StepPlan, StepResult
from scheduler_service.engine.executor_session import (
    Event,
    ExecutorJoined,
    ExecutorLeaving,
    ExecutorLost,
    Loss,
    Outgoing,
    Probed,
    Session,
    StepFinished,
)
from scheduler_service.engine.executor_wire import (
    Census,
    Drain,
    Fault,
    FromExecutor,
    Header,
    Heartbeat,
    Hello,
    Probe,
    Ready,
    Welcome,
    WireError,
    decode,
    encode,
)

logger = logging.getLogger(__name__)

HEARTBEAT_INTERVAL = 0.25  # seconds
# After some connection has broken, heartbeats find out whose: the socket forgets a peer a moment after it says so.
_SUSPICION_SECONDS = 0.1
_SUSPICIOUS_INTERVAL = 0.01
_MAX_EXECUTORS = 1024
_MAX_NAME = 128
_MAX_ROWS = 65_536
_MAX_TOKENS = 1 << 24
_MAX_BLOCKS = 1 << 24
_MAX_SLOTS = (1 << 31) - 1  # they travel as int32
_MAX_LOGGED_TOKENS = 1 << 32  # over all rows: the token logs of the core are as large as they may ever get


class ExecutorRegistry:
    """Knows every executor. Frames to send gather in ``outgoing``; all times are seconds of a steady clock."""

    def __init__(self, scheduler_id: str, lease: float) -> None:
        self.outgoing: deque[Outgoing] = deque()
        self.dropped: Counter[str] = Counter()  # frames, by reason
        self.losses: Counter[Loss] = Counter()
        self._scheduler_id = scheduler_id
        self._lease = lease
        self._sessions: dict[str, Session] = {}
        self._lost: dict[bytes, Session] = {}  # by routing id: their executors may still be there
        self._epochs: Counter[str] = Counter()
        self._model_fingerprint = ""
        self._kernel_fingerprint = ""
        self._next_heartbeat = 0.0
        self._suspicious_until = 0.0

    @property
    def next_tick(self) -> float:
        """When ``tick`` has something to do."""
        return self._next_heartbeat

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
        if isinstance(body, Probe):
            return [Probed(routing_id, header.boot_id, body.nonce)]
        session = self._session_of(routing_id, header)
        if session is None:
            self._receive_foreign(routing_id, header, body, now)
            return []
        session.last_heard = now
        self._forget_received(session, header.acked)
        return self._receive_in_session(session, body, now)

    def dispatch(self, executor_id: str, plan: StepPlan, now: float) -> None:
        """Send a plan; it is kept until the executor has acknowledged it."""
        session = self._sessions[executor_id]
        frame = encode(self._header(session), plan)
        session.dispatched = plan.step_id
        session.unreceived.append((plan.step_id, frame))
        session.watch.dispatched(len(plan.slot_mapping), now)
        self.outgoing.append(Outgoing(session.routing_id, frame))

    def tick(self, now: float) -> list[Event]:
        """Send heartbeats when they are due; end the sessions that are silent or stuck."""
        if now < self._next_heartbeat:
            return []
        self._next_heartbeat = now + (_SUSPICIOUS_INTERVAL if now < self._suspicious_until else HEARTBEAT_INTERVAL)
        events: list[Event] = []
        for executor_id, session in list(self._sessions.items()):
            if now - session.last_heard > self._lease:
                events += self.lose(executor_id, Loss.LEASE, "its lease ran out")
            elif (seconds := session.watch.overdue(now)) > 0:
                events += self.lose(executor_id, *_reason_of_delay(session, seconds))
        for session in self._sessions.values():
            if session.is_ready:
                self._send(session, Heartbeat(session.dispatched, session.settled))
        return events

    def suspect(self, now: float) -> None:
        """Some connection has broken: find out whose, at once."""
        self._suspicious_until = now + _SUSPICION_SECONDS
        self._next_heartbeat = now

    def unreachable(self, routing_id: bytes) -> list[Event]:
        """The socket knows no peer with this routing id any more."""
        for executor_id, session in self._sessions.items():
            if session.routing_id == routing_id:
                return self.lose(executor_id, Loss.CONNECTION, "its connection is gone")
        return []

    def lose(self, executor_id: str, loss: Loss, reason: str, faulty_step: int | None = None) -> list[Event]:
        """End a session; ``reason`` is for a person. An event only if the executor took plans."""
        session = self._sessions.pop(executor_id, None)
        if session is None:
            return []
        if loss is not Loss.RESTART:
            self._remember(session)
        if not session.is_ready:
            return []
        self.losses[loss] += 1
        return [ExecutorLost(executor_id, reason, faulty_step)]

    def leaving(self) -> list[str]:
        """Executors that are to be let go as soon as they hold nothing."""
        return [executor_id for executor_id, session in self._sessions.items() if session.is_leaving]

    def drain(self, executor_id: str) -> None:
        """Have an executor leave for good once it holds nothing."""
        session = self._sessions[executor_id]
        session.is_leaving, session.redirect = True, ""

    def keep(self, executor_id: str) -> None:
        """Take back ``drain``. An executor that wants to leave will say so again."""
        self._sessions[executor_id].is_leaving = False

    def release(self, executor_id: str) -> None:
        """Let an executor go: for good, or to where it wanted to go."""
        session = self._sessions.pop(executor_id)
        self._send(session, Drain(session.redirect))

    def refuse(self, executor_id: str, reason: str) -> None:
        """Turn an executor away that has just become ready; ``reason`` is for a person."""
        self._refuse(self._sessions.pop(executor_id), reason)

    def send_census(self, probed: Probed, queued_requests: int) -> None:
        """Tell an executor how much it is needed."""
        serving = sum(not session.is_leaving for session in self._sessions.values())
        header = Header("", probed.boot_id, 0, 0, 0)
        frame = encode(header, Census(probed.nonce, serving, queued_requests))
        self.outgoing.append(Outgoing(probed.routing_id, frame))

    # -------------------------------------------------------------------- Hello

    def _receive_hello(self, routing_id: bytes, header: Header, hello: Hello, now: float) -> list[Event]:
        known = self._sessions.get(hello.executor_id)
        if known is not None and known.boot_id == header.boot_id and known.hello.nonce == hello.nonce:
            known.last_heard = now
            self._send(known, self._welcome(hello, ""))
            return []
        reason = self._objection(hello)
        if reason:
            self._refuse(Session(routing_id, hello, header.boot_id, 0, now), reason)
            return []
        events = self.lose(hello.executor_id, Loss.RESTART, "it started anew")
        self._lost.pop(routing_id, None)
        self._open(routing_id, header, hello, now)
        return events

    def _refuse(self, session: Session, reason: str) -> None:
        hello = session.hello
        logger.warning("executor refused", extra={"executor_id": hello.executor_id[:_MAX_NAME], "reason": reason})
        self._send(session, self._welcome(hello, reason))

    def _remember(self, session: Session) -> None:
        if len(self._lost) >= _MAX_EXECUTORS:
            del self._lost[next(iter(self._lost))]
        self._lost[session.routing_id] = session

    def _receive_foreign(self, routing_id: bytes, header: Header, body: FromExecutor, now: float) -> None:
        """A frame of no session. An executor that does not know yet that its session is over gets a new one."""
        self._drop("foreign frame")
        lost = self._lost.get(routing_id)
        if lost is None or lost.boot_id != header.boot_id or header.scheduler_id != self._scheduler_id:
            return
        if isinstance(body, Drain):  # it holds nothing here
            self._send(lost, body)
        elif header.epoch <= lost.epoch and lost.hello.executor_id not in self._sessions:
            del self._lost[routing_id]
            self._open(routing_id, header, lost.hello, now)

    def _open(self, routing_id: bytes, header: Header, hello: Hello, now: float) -> None:
        self._epochs[hello.executor_id] += 1
        session = Session(routing_id, hello, header.boot_id, self._epochs[hello.executor_id], now)
        self._sessions[hello.executor_id] = session
        self._send(session, self._welcome(hello, ""))

    def _objection(self, hello: Hello) -> str:
        """Why an executor cannot be used; empty if it can."""
        limits = (
            ("block_size", hello.block_size, 1, 4096),
            ("num_blocks", hello.num_blocks, 1, min(_MAX_BLOCKS, _MAX_SLOTS // max(1, hello.block_size))),
            ("max_rows", hello.max_rows, 1, _MAX_ROWS),
            ("max_batched_tokens", hello.max_batched_tokens, hello.max_rows, _MAX_TOKENS),
            ("max_model_len", hello.max_model_len, 2, min(_MAX_TOKENS, _MAX_LOGGED_TOKENS // max(1, hello.max_rows))),
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
        hello = session.hello
        reason = self._objection(hello)  # its Hello may have come before the cluster had a model
        if reason:
            del self._sessions[hello.executor_id]
            self._refuse(session, reason)
            return []
        session.is_ready = True
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
            arithmetic=hello.kernel_fingerprint if "exact" in hello.features else None,
        )
        return [ExecutorJoined(hello.executor_id, hello, capacity)]

    # -------------------------------------------------------------------- steps

    def _receive_in_session(
        self, session: Session, body: StepResult | Heartbeat | Ready | Drain | Fault, now: float
    ) -> list[Event]:
        match body:
            case StepResult():
                return self._receive_result(session, body, now)
            case Heartbeat():
                session.answered = body.last_settled_step
                self._resend_plans(session, body.last_step)
                return []
            case Ready():
                return self._receive_ready(session)
            case Drain():
                return self._receive_drain(session, body)
            case Fault():
                reason = f"{body.code} in step {body.step_id}: {body.message}"
                is_in_flight = session.settled < body.step_id <= session.dispatched
                step = body.step_id if is_in_flight else None
                return self.lose(session.hello.executor_id, Loss.FAULT, reason, step)

    def _receive_drain(self, session: Session, drain: Drain) -> list[Event]:
        if session.is_leaving or (drain.redirect and not self._can_spare_one()):
            return []
        session.is_leaving, session.redirect = True, drain.redirect
        if not session.is_ready:
            self.release(session.hello.executor_id)
            return []
        return [ExecutorLeaving(session.hello.executor_id, drain.redirect)]

    def _can_spare_one(self) -> bool:
        """Whether one executor may go to another scheduler: one at a time, and never the last."""
        ready = [session for session in self._sessions.values() if session.is_ready]
        return len(ready) > 1 and not any(session.is_leaving for session in ready)

    def _receive_result(self, session: Session, result: StepResult, now: float) -> list[Event]:
        if result.step_id > session.dispatched:
            self._drop("result of no plan")
            return []
        if result.step_id != session.settled + 1:
            self._drop("repeated result" if result.step_id <= session.settled else "result after a gap")
            return []
        session.settled = result.step_id
        session.watch.settled(result.timings.device_us / 1e6, now)
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

    def _send(self, session: Session, body: Welcome | Heartbeat | Drain) -> None:
        self.outgoing.append(Outgoing(session.routing_id, encode(self._header(session), body)))

    def _drop(self, reason: str, detail: str = "") -> None:
        self.dropped[reason] += 1
        if self.dropped[reason] == 1:
            logger.warning("dropped a frame from an executor: %s%s", reason, detail and f": {detail}")


def _reason_of_delay(session: Session, seconds: float) -> tuple[Loss, str]:
    """Why nothing came of the oldest step for so long: what a connection silences in one direction is no stuck step."""
    if session.unreceived and session.unreceived[0][0] == session.settled + 1:
        return Loss.LEASE, f"a plan has not reached it for {seconds:.1f} s, though it is heard"
    if session.answered > session.settled:
        return Loss.LEASE, f"its answer to a step has not come for {seconds:.1f} s, though it is heard"
    return Loss.STUCK, f"a step has been running for {seconds:.1f} s"
