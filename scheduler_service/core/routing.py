"""Which executor a request goes to."""

from collections.abc import Mapping

from scheduler_service.core.request import Request
from scheduler_service.core.scheduler import Scheduler

# An executor gets at most this many requests beyond the running ones: the others stay in front, for whoever has room.
_MAX_WAITING_PER_EXECUTOR = 32
# A cached prefix may cost this much imbalance: the share of an executor's rows by which it is busier than the idlest.
_LOAD_FOR_PREFIX = 0.25


def has_room(scheduler: Scheduler, request: Request) -> bool:
    """Whether few enough requests wait there that run before this one."""
    return scheduler.backlog.waiting.num_up_to(request.priority) < _MAX_WAITING_PER_EXECUTOR


def choose(request: Request, schedulers: Mapping[str, Scheduler]) -> str | None:
    """The name of the best of ``schedulers``, all of which can take the request; None if there is none.

    Of those that are hardly busier than the idlest one, whoever holds most of the request's prefix; of equals the
    idlest, then the first. Requests that must run alone go where others of their kind are.
    """
    if len(schedulers) <= 1:
        return next(iter(schedulers), None)
    if request.is_quarantined:
        return max(schedulers, key=lambda name: (len(schedulers[name].backlog.suspects), -load(schedulers[name])))
    loads = {name: load(one) for name, one in schedulers.items()}
    bound = min(loads.values()) + _LOAD_FOR_PREFIX
    near = [name for name, busy in loads.items() if busy <= bound]
    return max(near, key=lambda name: (schedulers[name].kv.num_matching_tokens(request), -loads[name]))


def load(scheduler: Scheduler) -> float:
    """Requests per row."""
    return (scheduler.num_running + scheduler.num_waiting) / scheduler.capacity.max_rows
