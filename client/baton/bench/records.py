"""How a cluster is loaded, and what callers saw of it."""

from dataclasses import dataclass
from typing import TypeAlias

from baton.bench.arrivals import Arrivals
from baton.values import Usage

OK = "OK"
CUT_OFF = "CUT_OFF"  # the run was stopped before the request had ended


@dataclass(frozen=True, slots=True)
class OpenLoop:
    """Callers who do not wait for each other: so many requests a second, whatever becomes of them."""

    rate: float
    arrivals: Arrivals


@dataclass(frozen=True, slots=True)
class ClosedLoop:
    """So many callers, each of whom asks again when it has its answer."""

    concurrency: int


@dataclass(frozen=True, slots=True)
class Replay:
    """Requests come when the workload says."""


Load: TypeAlias = OpenLoop | ClosedLoop | Replay


def load_value(load: Load) -> float:
    """Where a run stands on the axis of a sweep: its rate or its concurrency. Replays are not swept."""
    match load:
        case OpenLoop():
            return load.rate
        case ClosedLoop():
            return load.concurrency
        case Replay():
            raise ValueError("a replay has no such value")


@dataclass(frozen=True, slots=True)
class Record:
    """One request as its caller saw it. Times are seconds after the start of the run.

    Attributes:
        due: when it had to be sent. Latencies count from here: a generator that lags must not hide that a caller
            would have waited ("coordinated omission", Gil Tene).
        sent: when it was.
        arrivals: when tokens came, and how many.
        ended: when its stream ended.
        status: OK, a gRPC status, the name of a client's error, or CUT_OFF.
        error: what went wrong; empty if nothing did.
        usage: token counts of a request that ended well.
    """

    due: float
    sent: float
    arrivals: tuple[tuple[float, int], ...]
    ended: float
    status: str
    error: str
    usage: Usage | None


@dataclass(frozen=True, slots=True)
class RunResult:
    """All requests of a run, in the order in which they ended; ``seconds`` from its start to the last one's end."""

    load: Load
    records: tuple[Record, ...]
    seconds: float
