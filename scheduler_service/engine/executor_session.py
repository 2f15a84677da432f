"""A session with an executor, and what can happen to it."""

from collections import deque
from dataclasses import dataclass, field
from enum import Enum

from scheduler_service.core.inflight import MAX_RUN_AHEAD
from scheduler_service.core.scheduler import ExecutorCapacity
from scheduler_service.core.step_plan import StepResult
from scheduler_service.engine.executor_wire import Hello
from scheduler_service.engine.step_watch import StepWatch


class Loss(Enum):
    """What ended a session with an executor that took plans."""

    LEASE = "lease"  # it was silent for too long
    CONNECTION = "connection"
    RESTART = "restart"  # it asked for a new session
    STUCK = "stuck"  # it lives, but a step does not end
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
    """Takes no more plans; what it had not answered is void.

    Attributes:
        faulty_step: the one in flight that failed, where it could say so.
    """

    executor_id: str
    reason: str
    faulty_step: int | None = None


@dataclass(frozen=True, slots=True)
class ExecutorLeaving:
    """Wants its requests to go to others, then to be let go; ``redirect``: to the scheduler at this endpoint."""

    executor_id: str
    redirect: str


@dataclass(frozen=True, slots=True)
class StepFinished:
    """The result of the executor's oldest step in flight."""

    executor_id: str
    result: StepResult


@dataclass(frozen=True, slots=True)
class Probed:
    """An executor without a session asks how much it is needed here."""

    routing_id: bytes
    boot_id: int
    nonce: int


Event = ExecutorJoined | ExecutorLost | ExecutorLeaving | StepFinished | Probed


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
    is_leaving: bool = False
    redirect: str = ""  # where it goes when it leaves; empty = it ends
    seq: int = 0
    dispatched: int = 0
    settled: int = 0
    answered: int = 0  # the last step whose result it has sent, as it says
    unreceived: deque[tuple[int, bytes]] = field(default_factory=lambda: deque(maxlen=MAX_RUN_AHEAD))
    missing_since: tuple[int, int] = (0, 0)  # (received, dispatched) as of the heartbeat before
    watch: StepWatch = field(default_factory=StepWatch)
