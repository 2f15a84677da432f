"""What is done to the cluster, one thing at a time, and when."""

import asyncio
import random
import signal
import time
from dataclasses import dataclass

from benchmarks.figures import note
from benchmarks.kill_test.cluster import ExecutorPlace, KillableCluster
from benchmarks.kill_test.hang import HangError
from benchmarks.kill_test.harms import LASTING
from benchmarks.kill_test.streams import Load
from benchmarks.kill_test.view import ClusterView

KINDS = ("kill", "stop", "hang", "term", "cut", "silence", "scheduler")

_POLL = 0.01
# From less than what the schedulers take to notice, to more.
_LASTS_SECONDS = {"stop": (1.0, 4.0), "silence": (1.0, 4.0), "hang": (2.0, 5.0)}
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
        self._view = ClusterView(cluster.addresses)

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
            else:
                victim, rows = await self._view.busiest()
                if rows < self._least_rows and self._load.live:
                    await asyncio.sleep(_POLL)
                    victim, rows = await self._view.busiest()
                place = next((one for one in self._cluster.executors if one.executor_id == victim), None)
                if place is None:
                    continue
                try:
                    await self._harm(kind, place, rows)
                except HangError as error:  # it had nothing to do any more
                    note(f"no hang: {error}")
            await self._view.all_back(len(self._cluster.executors))
            await asyncio.sleep(self._gap)

    async def close(self) -> None:
        """Let go of the cluster."""
        await self._view.close()

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

    async def _harm(self, kind: str, place: ExecutorPlace, rows: int) -> None:
        if kind in LASTING:
            async with LASTING[kind](place):
                self._record(kind, place.executor_id, rows)
                await asyncio.sleep(self._rng.uniform(*_LASTS_SECONDS[kind]))
            return
        self._record(kind, place.executor_id, rows)
        if kind == "cut":
            for proxy in place.proxies:
                proxy.cut()
            return
        place.signal(signal.SIGKILL if kind == "kill" else signal.SIGTERM)
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
