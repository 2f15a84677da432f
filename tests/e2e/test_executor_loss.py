"""Executors are cattle, streams are not: SIGKILL them, and every stream goes on as if nothing had happened."""

import asyncio
import os
import signal
from pathlib import Path

from baton import AsyncClient, AsyncStream, Client, Completion, LocalCluster
from tests.e2e.corpus import CorpusRequest
from tests.e2e.harness import eventually, is_idle, options

STREAMS = 16
TOKENS = 400
BACK_SECONDS = 60.0


class Streams:
    """Some greedy streams; counts what has come of each."""

    def __init__(self, requests: tuple[CorpusRequest, ...]) -> None:
        self._prompts = [one.prompt for one in requests[:STREAMS]]
        self.counts = [0] * STREAMS

    async def run(self, client: AsyncClient) -> list[Completion]:
        streams = [
            client.stream(prompt, max_tokens=TOKENS, temperature=0.0, ignore_eos=True) for prompt in self._prompts
        ]
        return list(await asyncio.gather(*(self._read(index, stream) for index, stream in enumerate(streams))))

    async def reached(self, count: int) -> None:
        while min(self.counts) < count:
            await asyncio.sleep(0.005)

    async def _read(self, index: int, stream: AsyncStream) -> Completion:
        async for delta in stream:
            self.counts[index] += len(delta.token_ids)
        return stream.completion


def kill(cluster: LocalCluster, *names: str) -> None:
    for name in names:
        os.kill(cluster.executor_pids()[name], signal.SIGKILL)


async def undisturbed(cluster: LocalCluster, requests: tuple[CorpusRequest, ...]) -> list[Completion]:
    async with AsyncClient(cluster.address) as client:
        return await Streams(requests).run(client)


async def with_deaths(cluster: LocalCluster, requests: tuple[CorpusRequest, ...]) -> list[Completion]:
    """First one executor dies among running streams, then all that are there."""
    streams = Streams(requests)
    async with AsyncClient(cluster.address) as client:
        running = asyncio.create_task(streams.run(client))
        await streams.reached(20)
        kill(cluster, "executor-0")
        await streams.reached(60)
        kill(cluster, *cluster.executor_pids())
        assert not running.done() and max(streams.counts) < TOKENS, "nothing was left to disturb"
        return await running


def test_streams_survive_their_executors(checkpoint_f32: Path, requests: tuple[CorpusRequest, ...]) -> None:
    with LocalCluster(options(checkpoint_f32, executors=2)) as cluster, Client(cluster.address) as client:
        before = asyncio.run(undisturbed(cluster, requests))
        pids = cluster.executor_pids()
        after = asyncio.run(with_deaths(cluster, requests))
        assert [one.token_ids for one in after] == [one.token_ids for one in before]
        assert [one.text for one in after] == [one.text for one in before]
        assert {one.usage.completion_tokens for one in after} == {TOKENS}
        assert eventually(lambda: len(client.cluster_status().executors) == 2, BACK_SECONDS)
        replaced = cluster.executor_pids()
        assert replaced.keys() == pids.keys() and not set(replaced.values()) & set(pids.values())
        assert is_idle(client.cluster_status())
        again = asyncio.run(undisturbed(cluster, requests))
        assert [one.token_ids for one in again] == [one.token_ids for one in before]
