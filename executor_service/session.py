"""The executor's side of a session with a scheduler: Hello, epochs, loss, liveness. No sockets, no clock of its own."""

import logging
import secrets
from collections import Counter, deque
from dataclasses import dataclass

from executor_service.inbox import Inbox, PlanArrival, Stop
from executor_service.step_plan import Fault, MalformedPlan, StepPlan, StepResult
from executor_service.wire import (
    Capacity,
    Drain,
    Frame,
    Header,
    Heartbeat,
    Hello,
    Outgoing,
    Ready,
    VersionError,
    Welcome,
    WireError,
    decode,
    encode,
)

logger = logging.getLogger(__name__)

EXIT_DRAINED = 0
EXIT_REJECTED = 3

_FIRST_HELLO_INTERVAL = 0.1
_MAX_HELLO_INTERVAL = 1.0
_DEFAULT_HEARTBEAT = 0.25
_DEFAULT_LEASE = 2.0
_MAX_UNSETTLED_RESULTS = 64
_MAX_OUTGOING = 128


@dataclass(slots=True)
class _Unsettled:
    """A result that the scheduler has not acknowledged, and when it was last sent."""

    result: StepResult
    sent_at: float


@dataclass(slots=True)
class _Epoch:
    """One session. Results stay in ``unsettled`` until the scheduler's ``acked`` covers them.

    ``number`` counts the sessions of this process, whoever they are with. The main thread knows them by it: what it
    computed for one scheduler must not go to another one that happens to be in the same epoch.
    """

    number: int
    scheduler_id: str
    epoch: int
    heartbeat: float
    lease: float
    received: int = 0  # highest step received without a gap
    sent: int = 0  # highest step whose result was sent
    is_ready: bool = False


class Session:
    """Decides what each received frame and each moment in time means. All times are ``time.monotonic`` seconds.

    Frames to send collect in ``outgoing``. Delivery is never assumed: plans are taken strictly in order (a later one is
    dropped until the missing one has been sent again), results are kept until acknowledged.

    Attributes:
        outgoing: encoded frames, oldest first; the owner of the socket takes them from the left.
        dropped: frames and plans that were ignored, by reason.
    """

    def __init__(self, capacity: Capacity, boot_id: int, inbox: Inbox, now: float) -> None:
        self.outgoing: deque[bytes] = deque()
        self.dropped: Counter[str] = Counter()
        self._capacity = capacity
        self._boot_id = boot_id
        self._inbox = inbox
        self._epoch: _Epoch | None = None
        self._num_epochs = 0
        self._unsettled: dict[int, _Unsettled] = {}
        self._seq = 0
        self._last_heard = now
        self._nonce = 0
        self._next_send = now
        self._hello_interval = _FIRST_HELLO_INTERVAL
        self._gap_reported = False
        self._is_leaving = False
        self._redirect = ""
        self._faithful_until = now
        self._start_hello(now)

    @property
    def is_connected(self) -> bool:
        """Whether a scheduler has welcomed this executor and been heard since."""
        return self._epoch is not None

    @property
    def is_leaving(self) -> bool:
        """Whether this executor is to end as soon as others have its work."""
        return self._is_leaving

    def is_seeking(self, now: float) -> bool:
        """Whether any scheduler is as good as another: not in a session, nor right after a fault."""
        return self._epoch is None and now >= self._faithful_until

    def take_redirect(self) -> str:
        """Where the scheduler that has just let this executor go sends it; empty if nowhere."""
        redirect, self._redirect = self._redirect, ""
        return redirect

    # ---------------------------------------------------------------- time

    @property
    def deadline(self) -> float:
        """When ``tick`` next has something to do."""
        if self._epoch is None:
            return self._next_send
        return min(self._next_send, self._last_heard + self._epoch.lease)

    def tick(self, now: float) -> None:
        """Send what is due; give up a scheduler that has been silent for its lease."""
        epoch = self._epoch
        if epoch is not None and now >= self._last_heard + epoch.lease:
            self.lose(now, f"silent for {now - self._last_heard:.1f} s")
        if now < self._next_send:
            return
        if self._epoch is None:
            if not self.outgoing:  # else there is no connection, and a Hello still waits
                self._send(Hello(self._nonce, self._capacity))
            self._next_send = now + self._hello_interval
            self._hello_interval = min(2 * self._hello_interval, _MAX_HELLO_INTERVAL)
        else:
            self._send_heartbeat(self._epoch, now)
            if self._is_leaving:
                self._send(Drain(""))

    def lose(self, now: float, reason: str) -> None:
        """Give up the scheduler, and with it all work; ``reason`` is for a person."""
        logger.warning("scheduler lost, dropping all work and reconnecting", extra={"reason": reason})
        self._start_hello(now)
        if self._is_leaving:
            self._end("its scheduler is gone")

    # ---------------------------------------------------------------- leaving

    def drain(self) -> None:
        """Leave for good as soon as the scheduler has handed all work to others; at once if there is no scheduler."""
        self._is_leaving = True
        if self._epoch is None:
            self._end("it was in no session")
        else:
            self._send(Drain(""))

    def ask_to_move(self, redirect: str) -> None:
        """Ask to be let go to another scheduler; ours may think otherwise, and then does not answer."""
        if self._epoch is not None and not self._is_leaving:
            self._send(Drain(redirect))

    def _end(self, why: str) -> None:
        self._inbox.stop(Stop(EXIT_DRAINED, f"this executor was drained: {why}"))

    def _receive_drain(self, drain: Drain, now: float) -> None:
        if self._is_leaving or not drain.redirect:
            self._end("the scheduler let it go")
            return
        logger.info("let go to %s", drain.redirect)
        self._start_hello(now)
        self._redirect = drain.redirect

    # ---------------------------------------------------------------- from the main thread

    def ready(self, epoch: int) -> None:
        """Rows, tables and queues are clear for ``epoch``."""
        current = self._current(epoch)
        if current is not None:
            current.is_ready = True
            self._send(Ready())

    def result(self, epoch: int, result: StepResult, now: float) -> None:
        """Send a step's result and keep it until it is acknowledged. One of an earlier epoch is dropped."""
        current = self._current(epoch)
        if current is None:
            return
        current.sent = result.step_id
        self._unsettled[result.step_id] = _Unsettled(result, now)
        if len(self._unsettled) > _MAX_UNSETTLED_RESULTS:
            self._unsettled.pop(next(iter(self._unsettled)))
            self._drop("unacknowledged result")
        self._send(result)

    def fault(self, epoch: int, fault: Fault, now: float) -> None:
        """Report a fault and ask for a new session."""
        if self._current(epoch) is not None:
            fields = {"step_id": fault.step_id, "code": fault.code.name, "reason": fault.message}
            logger.error("fault, asking for a new session", extra=fields)
            lease = self._epoch.lease if self._epoch is not None else _DEFAULT_LEASE
            self._start_hello(now, fault)
            self._faithful_until = now + lease
            if self._is_leaving:
                self._end("a step failed")

    # ---------------------------------------------------------------- from the scheduler

    def receive(self, data: bytes, now: float) -> None:
        """Take in one frame. Nothing in it is fatal."""
        try:
            frame = decode(data)
        except VersionError as error:
            self._drop("other protocol version", str(error))
            return
        except WireError as error:
            self._drop("undecodable frame", str(error))
            return
        if frame.header.boot_id != self._boot_id:
            self._drop("foreign frame")
        elif isinstance(frame.body, Welcome):
            self._receive_welcome(frame.header, frame.body, now)
        elif self._epoch is None or not _belongs(frame.header, self._epoch):
            self._drop("foreign frame")
        else:
            self._last_heard = now
            self._receive_in_epoch(frame, self._epoch, now)

    def _receive_welcome(self, header: Header, welcome: Welcome, now: float) -> None:
        if welcome.nonce != self._nonce:
            self._drop("stale welcome")
            return
        if not welcome.accepted:
            self._inbox.stop(Stop(EXIT_REJECTED, f"the scheduler refuses this executor: {welcome.reject_reason}"))
            return
        current = self._epoch
        if current is not None and _belongs(header, current):
            self._last_heard = now
            if current.is_ready and current.received == 0:  # the Ready may have been lost
                self._send(Ready())
            return
        # a higher epoch with the same nonce is how a scheduler restarts a session by itself
        if header.epoch < 1 or (current is not None and header.epoch < current.epoch):
            self._drop("stale welcome")
            return
        self._start_epoch(header, welcome, now)

    def _receive_in_epoch(self, frame: Frame, epoch: _Epoch, now: float) -> None:
        settled = frame.header.acked
        match frame.body:
            case StepPlan() | MalformedPlan():
                self._receive_plan(frame.body, epoch, now)
            case Heartbeat():
                settled = max(settled, frame.body.last_settled_step)
            case Drain():
                self._receive_drain(frame.body, now)
                return
            case _:
                self._drop("frame of an unknown kind")
        while self._unsettled and (first := next(iter(self._unsettled))) <= settled:
            del self._unsettled[first]
        if isinstance(frame.body, Heartbeat):
            self._resend_results(epoch, now)

    def _receive_plan(self, plan: StepPlan | MalformedPlan, epoch: _Epoch, now: float) -> None:
        if plan.step_id <= epoch.received:
            self._drop("repeated plan")
        elif plan.step_id > epoch.received + 1:
            if not self._gap_reported:  # tell the scheduler at once, once per gap
                self._gap_reported = True
                self._send_heartbeat(epoch, now)
            self._drop("plan after a gap")
        elif self._inbox.offer(PlanArrival(epoch.number, plan, now)):
            epoch.received = plan.step_id
            self._gap_reported = False
        else:
            self._drop("plan over a full queue")

    def _resend_results(self, epoch: _Epoch, now: float) -> None:
        for unsettled in self._unsettled.values():
            if now - unsettled.sent_at > epoch.heartbeat:
                unsettled.sent_at = now
                self._send(unsettled.result)

    # ---------------------------------------------------------------- transitions

    def _start_hello(self, now: float, fault: Fault | None = None) -> None:
        """End the session, if any, and ask for a new one under a fresh nonce; a fault is told first."""
        if fault is None:
            self.outgoing.clear()
        else:  # results of the steps before it, which may still wait here, are good
            self._send(fault)
        self._epoch = None
        self._unsettled.clear()
        self._inbox.clear()
        self._nonce = secrets.randbits(64)
        self._hello_interval = _FIRST_HELLO_INTERVAL
        self._gap_reported = False
        self._send(Hello(self._nonce, self._capacity))
        self._next_send = now + self._hello_interval

    def _start_epoch(self, header: Header, welcome: Welcome, now: float) -> None:
        heartbeat = welcome.heartbeat_ms / 1e3 or _DEFAULT_HEARTBEAT
        lease = welcome.lease_ms / 1e3 or _DEFAULT_LEASE
        self._num_epochs += 1
        self._epoch = _Epoch(self._num_epochs, header.scheduler_id, header.epoch, heartbeat, lease)
        self._unsettled.clear()
        self.outgoing.clear()
        self._seq = 0
        self._gap_reported = False
        self._last_heard = now
        self._next_send = now + heartbeat
        self._inbox.restart(self._num_epochs)
        logger.info("session begins", extra={"scheduler_id": header.scheduler_id, "epoch": header.epoch})

    # ---------------------------------------------------------------- frames

    def _current(self, number: int) -> _Epoch | None:
        current = self._epoch
        return current if current is not None and current.number == number else None

    def _send_heartbeat(self, epoch: _Epoch, now: float) -> None:
        self._send(Heartbeat(epoch.received, epoch.sent))
        self._next_send = now + epoch.heartbeat

    def _send(self, body: Outgoing) -> None:
        if len(self.outgoing) >= _MAX_OUTGOING:
            self._drop("frame to a scheduler that does not read")
            return
        epoch = self._epoch
        self._seq += 1
        if epoch is None:
            header = Header("", self._boot_id, 0, self._seq, 0)
        else:
            header = Header(epoch.scheduler_id, self._boot_id, epoch.epoch, self._seq, epoch.received)
        self.outgoing.append(encode(header, body))

    def _drop(self, reason: str, detail: str = "") -> None:
        self.dropped[reason] += 1
        if self.dropped[reason] == 1:
            logger.warning("dropped a first %s%s", reason, f": {detail}" if detail else "")


def _belongs(header: Header, epoch: _Epoch) -> bool:
    return header.scheduler_id == epoch.scheduler_id and header.epoch == epoch.epoch
