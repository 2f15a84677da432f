"""What two looks at a cluster tell together: rates, and executors that left. No clock, no terminal."""

from dataclasses import dataclass

from baton.values import ClusterStatus, ExecutorStatus

_MAX_GONE = 64  # of the executors that left, so many are remembered


@dataclass(frozen=True, slots=True)
class Rates:
    """What an executor did between two looks.

    Attributes:
        steps_per_s: plans sent to it.
        step_ms: device time of a step; None when there was none.
        starved: share of the time in which it had work and no plan, 0 to 1; None when it did nothing.
        tokens_per_s: tokens sampled.
        prefill_per_s: further tokens computed: of prompts, and of what was computed again.
        prefix_hits: share of the looked up prompt tokens that were cached, 0 to 1; None when none was looked up.
    """

    steps_per_s: float
    step_ms: float | None
    starved: float | None
    tokens_per_s: float
    prefill_per_s: float
    prefix_hits: float | None


@dataclass(frozen=True, slots=True)
class Look:
    """A cluster at a moment.

    Attributes:
        status: as the scheduler reports it.
        rates: since the look before, by executor id; without those that were not there then.
        gone: executors that were there and are no more, by id, as they were last seen.
        sessions_ended: how many sessions with executors have ended since the scheduler's start, of the executors seen.
    """

    status: ClusterStatus
    rates: dict[str, Rates]
    gone: dict[str, ExecutorStatus]
    sessions_ended: int

    @property
    def tokens_per_s(self) -> float | None:
        """That of all executors; None when nothing can be told yet."""
        return sum(one.tokens_per_s for one in self.rates.values()) if self.rates else None


class History:
    """Remembers the look before, and the executors that left."""

    def __init__(self) -> None:
        self._scheduler_id = ""
        self._seen: dict[str, ExecutorStatus] = {}  # present executors, as of the look before
        self._gone: dict[str, ExecutorStatus] = {}
        self._moment = 0.0

    def look(self, status: ClusterStatus, moment: float) -> Look:
        """Takes in a status that was true at ``moment``, in seconds of any steady clock."""
        if status.scheduler_id != self._scheduler_id:  # another scheduler: nothing before it counts
            self._scheduler_id, self._seen, self._gone = status.scheduler_id, {}, {}
        present = {one.executor_id: one for one in status.executors}
        seconds = moment - self._moment
        rates = {
            name: found
            for name, one in present.items()
            if (before := self._seen.get(name)) is not None and (found := _rates(before, one, seconds)) is not None
        }
        left = {name: one for name, one in (self._gone | self._seen).items() if name not in present}
        self._gone = dict(list(left.items())[-_MAX_GONE:])
        self._seen, self._moment = present, moment
        ended = sum(one.epoch - 1 for one in present.values()) + sum(one.epoch for one in self._gone.values())
        return Look(status, rates, dict(self._gone), ended)


def _rates(before: ExecutorStatus, now: ExecutorStatus, seconds: float) -> Rates | None:
    """None across sessions: counters begin anew."""
    if now.epoch != before.epoch or seconds <= 0:
        return None
    steps = now.steps - before.steps
    device, starved = now.device_us - before.device_us, now.starved_us - before.starved_us
    asked = now.prefix_query_tokens - before.prefix_query_tokens
    sampled = now.sampled_tokens - before.sampled_tokens
    computed = now.computed_tokens - before.computed_tokens
    return Rates(
        steps_per_s=steps / seconds,
        step_ms=device / 1e3 / steps if steps else None,
        starved=starved / (device + starved) if device + starved else None,
        tokens_per_s=sampled / seconds,
        prefill_per_s=max(0, computed - sampled) / seconds,
        prefix_hits=(now.prefix_hit_tokens - before.prefix_hit_tokens) / asked if asked else None,
    )
