"""Executors that come while others are busy: what runs moves to them, and no caller notices."""

import asyncio
import signal
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from baton import AsyncClient, Completion
from baton.checkpoints import TINY_PYTHON
from benchmarks.kill_test.cluster import ExecutorPlace, KillableCluster, Settings

PROMPTS = ("def fibonacci(n):", "import os\n", "class Stack:\n", "for i in range(10):\n")
STREAMS = 12
TOKENS = 1900
WAIT_SECONDS = 60.0
ROUNDS = 3  # a newcomer may be slow to start, and streams be over before it is there


def settings(schedulers: int, executors: int) -> Settings:
    return Settings(model=TINY_PYTHON, schedulers=schedulers, executors=executors, num_blocks=3000, max_rows=32)


class Streams:
    """Seeded streams, read at the same time; counts what has come of each."""

    def __init__(self) -> None:
        self.counts = [0] * STREAMS

    async def run(self, client: AsyncClient) -> list[Completion]:
        return list(await asyncio.gather(*(self._read(client, index) for index in range(STREAMS))))

    async def reached(self, count: int) -> None:
        while min(self.counts) < count:
            await asyncio.sleep(0.005)

    async def _read(self, client: AsyncClient, index: int) -> Completion:
        prompt = PROMPTS[index % len(PROMPTS)]
        async with client.stream(prompt, max_tokens=TOKENS, seed=index, ignore_eos=True) as stream:
            async for delta in stream:
                self.counts[index] += len(delta.token_ids)
            return stream.completion


async def rows(client: AsyncClient) -> dict[str, int]:
    return {one.executor_id: one.running_requests for one in (await client.cluster_status()).executors}


async def num_executors(client: AsyncClient, count: int) -> None:
    deadline = time.monotonic() + WAIT_SECONDS
    while len(await rows(client)) != count:
        assert time.monotonic() < deadline
        await asyncio.sleep(0.02)


@asynccontextmanager
async def clients(cluster: KillableCluster) -> AsyncIterator[list[AsyncClient]]:
    await cluster.start()
    connected = [AsyncClient(address) for address in cluster.addresses]
    try:
        for client in connected:
            await client.wait_ready(WAIT_SECONDS)
        yield connected
    finally:
        for client in connected:
            await client.close()


def assert_same(found: list[Completion], expected: list[Completion]) -> None:
    assert [one.token_ids for one in found] == [one.token_ids for one in expected]
    assert [one.text for one in found] == [one.text for one in expected]
    assert [one.finish_reason for one in found] == [one.finish_reason for one in expected]
    assert all(one.exact for one in found)


async def join_while_loaded(cluster: KillableCluster) -> None:
    newcomer = ExecutorPlace("executor-1", [])
    async with clients(cluster) as (client,):
        cluster.executors.append(newcomer)
        expected = await Streams().run(client)
        for _ in range(ROUNDS):
            streams = Streams()
            running = asyncio.create_task(streams.run(client))
            await streams.reached(5)
            assert await rows(client) == {"executor-0": STREAMS}
            await asyncio.to_thread(cluster.start_executor, newcomer)
            have_moved = False
            while not running.done() and not have_moved:
                found = await rows(client)
                have_moved = len(found) == 2 and min(found.values()) >= STREAMS // 4
                await asyncio.sleep(0.02)
            assert_same(await running, expected)
            if have_moved:
                return
            newcomer.signal(signal.SIGKILL)
            await num_executors(client, 1)
        raise AssertionError("nothing has moved")


def test_streams_move_to_an_executor_that_joins() -> None:
    with KillableCluster(settings(schedulers=1, executors=1)) as cluster:
        asyncio.run(join_while_loaded(cluster))


async def starve_one_scheduler(cluster: KillableCluster) -> None:
    async with clients(cluster) as (rich, poor):
        pids = [place.pid for place in cluster.executors]
        cluster.schedulers[1].kill()
        await num_executors(rich, 2)
        expected = await Streams().run(rich)
        streams = Streams()
        running = asyncio.create_task(streams.run(rich))
        await streams.reached(20)
        assert min((await rows(rich)).values()) > 0
        cluster.schedulers[1].start()
        await asyncio.to_thread(cluster.schedulers[1].await_start)
        await num_executors(rich, 1)
        await num_executors(poor, 1)
        assert_same(await running, expected)
        assert not any(place.is_gone() for place in cluster.executors)
        assert pids == [place.pid for place in cluster.executors]
        assert (await poor.generate(PROMPTS[0], max_tokens=20, seed=0, ignore_eos=True)).token_ids == (
            expected[0].token_ids[:20]
        )


def test_a_scheduler_with_several_executors_lets_one_go_to_one_without() -> None:
    with KillableCluster(settings(schedulers=2, executors=2)) as cluster:
        asyncio.run(starve_one_scheduler(cluster))
