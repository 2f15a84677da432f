"""Requests that wait for their caller to come back: for how long, and how many of a tenant."""

import asyncio
from collections.abc import Callable
from enum import StrEnum
from typing import NamedTuple

from scheduler_service.api.request_key import RequestKey


class HoldEnd(StrEnum):
    """How a request's wait for its caller ends."""

    RESUMED = "resumed"  # the caller has come back
    EXPIRED = "expired"  # the window has closed
    DISPLACED = "displaced"  # the tenant has lost more callers than it may have requests wait
    DROPPED = "dropped"  # it was aborted, or the scheduler is shutting down


class _Hold(NamedTuple):
    timer: asyncio.TimerHandle
    drop: Callable[[], None]


class Holds:
    """Who waits. Where a tenant has too many, the one that has waited longest gives way: its caller is the least likely
    to come back, and one that does goes on from its resume points all the same.
    """

    def __init__(self, max_per_tenant: int, note_end: Callable[[HoldEnd], None]) -> None:
        """Create an empty collection; ``note_end`` is told how each wait ends."""
        self._max_per_tenant = max_per_tenant
        self._note_end = note_end
        self._tenants: dict[str, dict[RequestKey, _Hold]] = {}

    def __len__(self) -> int:
        return sum(map(len, self._tenants.values()))

    def __contains__(self, key: RequestKey) -> bool:
        return key in self._tenants.get(key.tenant, ())

    def waiting(self) -> list[RequestKey]:
        """All of them."""
        return [key for held in self._tenants.values() for key in held]

    def begin(self, key: RequestKey, window: float, drop: Callable[[], None]) -> None:
        """Have a request wait for ``window`` seconds, after which, or when another displaces it, ``drop`` is called."""
        held = self._tenants.get(key.tenant, {})
        if len(held) >= self._max_per_tenant:
            self._give_up(next(iter(held)), HoldEnd.DISPLACED)
        timer = asyncio.get_running_loop().call_later(window, self._give_up, key, HoldEnd.EXPIRED)
        self._tenants.setdefault(key.tenant, {})[key] = _Hold(timer, drop)

    def end(self, key: RequestKey, how: HoldEnd) -> None:
        """A request waits no longer, if it did."""
        held = self._tenants.get(key.tenant, {})
        hold = held.pop(key, None)
        if hold is None:
            return
        hold.timer.cancel()
        if not held:
            del self._tenants[key.tenant]
        self._note_end(how)

    def _give_up(self, key: RequestKey, how: HoldEnd) -> None:
        drop = self._tenants[key.tenant][key].drop
        self.end(key, how)
        drop()
