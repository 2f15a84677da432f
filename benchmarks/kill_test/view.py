"""What the schedulers say of their executors."""

import asyncio
import contextlib
import time

from baton import AsyncClient, BatonError, ExecutorStatus
from benchmarks.figures import note

_POLL = 0.01
_BACK_SECONDS = 30.0
_STATUS_SECONDS = 1.0


class ClusterView:
    """Asks all schedulers, and takes what those say that answer."""

    def __init__(self, addresses: list[str]) -> None:
        self._watchers = [AsyncClient(address) for address in addresses]

    async def statuses(self) -> list[ExecutorStatus]:
        """All executors that take plans."""
        found: list[ExecutorStatus] = []
        for watcher in self._watchers:
            with contextlib.suppress(BatonError):
                found += (await watcher.cluster_status(timeout=_STATUS_SECONDS)).executors
        return found

    async def rows(self) -> dict[str, int]:
        """Running rows by executor."""
        return {one.executor_id: one.running_requests for one in await self.statuses()}

    async def busiest(self) -> tuple[str, int]:
        """The executor with most running rows, and how many; an empty name if there is none."""
        return max((await self.rows()).items(), key=lambda item: item[1], default=("", 0))

    async def all_back(self, num_executors: int) -> None:
        """Wait until so many executors take plans."""
        deadline = time.monotonic() + _BACK_SECONDS
        while len(await self.rows()) < num_executors:
            if time.monotonic() > deadline:
                note("not every executor came back")
                return
            await asyncio.sleep(_POLL)

    async def close(self) -> None:
        """Ask no more."""
        for watcher in self._watchers:
            await watcher.close()
