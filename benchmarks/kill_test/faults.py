"""What is done to the cluster, one thing at a time, and when."""

import asyncio
import random
import signal
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from baton import AsyncClient, BatonError
from benchmarks.figures import note
from benchmarks.kill_test.cluster import ExecutorPlace, KillableCluster
from benchmarks.kill_test.streams import Load

KINDS = ("kill", "stop", "term", "cut", "silence", "scheduler")

_POLL = 0.01
_BACK_SECONDS = 30.0
_FREEZE_SECONDS = (2.6, 4.0)
_STATUS_SECONDS = 1.0
_MOST_TOKENS_AHEAD = 40


@dataclass(frozen=True, slots=True)
class FaultRecord:
    """One fault: what, to whom, when (monotonic seconds), and how many rows ran there just before."""

    kind: str
    victim: str
    at: float
    rows: int


class Faults:
    """Does harm to a cluster under load.

    Attributes:
        records: what was done.
    """

    def __init__(self, cluster: KillableCluster, load: Load, seed: int, least_rows: int, gap: float) -> None:
        self.records: list[FaultRecord] = []
        self._cluster = cluster
        self._load = load
        self._rng = random.Random(seed)
        self._least_rows = least_rows
        self._gap = gap  # seconds
        self._watchers = [AsyncClient(address) for address in cluster.addresses]
        self._kinds: dict[str, Callable[[ExecutorPlace], Awaitable[None]]] = {
            "kill": self._kill,
            "stop": self._stop,
            "term": self._terminate,
            "cut": self._cut,
            "silence": self._silence,
        }

    async def run(self, kinds: list[str], count: int) -> None:
        """Do ``count`` things while the load is full, evenly, each at a random token of a random stream."""
        for number in range(count):
            while len(self._load.done) < number * self._load.full_until / count:
                await asyncio.sleep(_POLL)
            if not await self._some_token():
                return
            kind = self._rng.choice(kinds)
            if kind == "scheduler":
                await self._kill_scheduler()
                await asyncio.sleep(self._gap)
                continue
            rows = await self._rows()
            victim, running = max(rows.items(), key=lambda item: item[1], default=("", 0))
            if running < self._least_rows and self._load.live:
                await asyncio.sleep(_POLL)
                rows = await self._rows()
                victim, running = max(rows.items(), key=lambda item: item[1], default=("", 0))
            place = next((one for one in self._cluster.executors if one.executor_id == victim), None)
            if place is None:
                continue
            self._record(kind, victim, running)
            await self._kinds[kind](place)
            await self._all_back()
            await asyncio.sleep(self._gap)

    async def close(self) -> None:
        """Let go of the cluster."""
        for watcher in self._watchers:
            await watcher.close()

    def _record(self, kind: str, victim: str, rows: int) -> None:
        self.records.append(FaultRecord(kind, victim, time.monotonic(), rows))

    async def _some_token(self) -> bool:
        """Wait until a random stream has come a random number of tokens further; False when all is over."""
        while not self._load.is_over:
            if not self._load.live:
                await asyncio.sleep(_POLL)
                continue
            stream = self._rng.choice(list(self._load.live))
            goal = stream.tokens + self._rng.randrange(1, _MOST_TOKENS_AHEAD)
            while stream in self._load.live:
                if stream.tokens >= goal:
                    return True
                await asyncio.sleep(_POLL)
        return False

    async def _rows(self) -> dict[str, int]:
        """Running rows by executor, over all schedulers that answer."""
        rows: dict[str, int] = {}
        for watcher in self._watchers:
            try:
                status = await watcher.cluster_status(timeout=_STATUS_SECONDS)
            except BatonError:
                continue
            rows |= {one.executor_id: one.running_requests for one in status.executors}
        return rows

    async def _all_back(self) -> None:
        """Wait until every executor takes plans again."""
        deadline = time.monotonic() + _BACK_SECONDS
        while len(await self._rows()) < len(self._cluster.executors):
            if time.monotonic() > deadline:
                note("not every executor came back")
                return
            await asyncio.sleep(_POLL)

    async def _kill(self, place: ExecutorPlace) -> None:
        place.signal(signal.SIGKILL)
        await self._restart(place)

    async def _stop(self, place: ExecutorPlace) -> None:
        place.signal(signal.SIGSTOP)
        await asyncio.sleep(self._rng.uniform(*_FREEZE_SECONDS))
        place.signal(signal.SIGCONT)

    async def _terminate(self, place: ExecutorPlace) -> None:
        place.signal(signal.SIGTERM)
        await self._restart(place)

    async def _cut(self, place: ExecutorPlace) -> None:
        for proxy in place.proxies:
            proxy.cut()

    async def _silence(self, place: ExecutorPlace) -> None:
        for proxy in place.proxies:
            proxy.silence()
        await asyncio.sleep(self._rng.uniform(*_FREEZE_SECONDS))
        for proxy in place.proxies:
            proxy.heal()

    async def _restart(self, place: ExecutorPlace) -> None:
        while not place.is_gone():
            await asyncio.sleep(_POLL)
        self._cluster.start_executor(place)

    async def _kill_scheduler(self) -> None:
        scheduler = self._rng.choice(self._cluster.schedulers)
        self._record("scheduler", scheduler.address, len(self._load.live) // len(self._cluster.schedulers))
        scheduler.kill()
        await asyncio.sleep(self._rng.uniform(0.5, 1.5))
        scheduler.start()
        await asyncio.to_thread(scheduler.await_start)
        await self._all_back()
