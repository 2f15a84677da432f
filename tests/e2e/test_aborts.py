"""Requests that are aborted, and clients that vanish, leave nothing behind."""

import asyncio
import subprocess
import sys

from baton import AsyncClient, Client, FinishReason, LocalCluster
from tests.e2e.corpus import CorpusRequest
from tests.e2e.harness import eventually, is_idle, run_alone

STORM = 10_000
WAVE = 500
IDLE_SECONDS = 15.0
# A client that opens streams, says when all of them have tokens, and reads on until it is killed.
VANISHING = """
import asyncio, sys
from baton import AsyncClient

async def read_on(client, prompt, begun):
    async for _ in client.stream(prompt, max_tokens=1500, ignore_eos=True):
        begun.set()

async def main():
    client = AsyncClient(sys.argv[1])
    begun = [asyncio.Event() for _ in range(50)]
    streams = [asyncio.create_task(read_on(client, [i + 1, 7, 9], each)) for i, each in enumerate(begun)]
    await asyncio.gather(*(each.wait() for each in begun))
    print("begun", flush=True)
    await asyncio.gather(*streams)

asyncio.run(main())
"""


async def end_early(client: AsyncClient, number: int, requests: tuple[CorpusRequest, ...]) -> None:
    """Starts a request that would go on for long and ends it: before its first token, after it, or by its name."""
    name = f"storm-{number}"
    prompt = requests[number % len(requests)].prompt
    async with client.stream(prompt, max_tokens=1000, ignore_eos=True, request_id=name) as stream:
        if number % 3 == 0:
            await asyncio.sleep(0.001 * (number % 100))
            return
        await anext(stream)
        if number % 3 == 1:
            return
        await client.abort(name)
        completion = await stream.result()
        assert completion.finish_reason is FinishReason.ABORT
        assert completion.usage.completion_tokens == len(completion.token_ids) < 1000


async def storm(address: str, requests: tuple[CorpusRequest, ...]) -> None:
    async with AsyncClient(address) as client:
        for first in range(0, STORM, WAVE):
            await asyncio.gather(*(end_early(client, first + i, requests) for i in range(WAVE)))


def assert_nothing_is_left(client: Client, requests: tuple[CorpusRequest, ...], expected: tuple[int, ...]) -> None:
    assert eventually(lambda: is_idle(client.cluster_status()), IDLE_SECONDS), client.cluster_status()
    (executor,) = client.cluster_status().executors
    assert executor.free_blocks + executor.cached_blocks == executor.total_blocks
    assert run_alone(client, requests[0], temperature=0.0).token_ids == expected


def test_abort_storm(
    cluster: LocalCluster,
    client: Client,
    requests: tuple[CorpusRequest, ...],
    greedy_tokens: list[tuple[int, ...]],
) -> None:
    asyncio.run(storm(cluster.address, requests))
    assert_nothing_is_left(client, requests, greedy_tokens[0])


def test_clients_that_vanish(
    cluster: LocalCluster,
    client: Client,
    requests: tuple[CorpusRequest, ...],
    greedy_tokens: list[tuple[int, ...]],
) -> None:
    command = [sys.executable, "-c", VANISHING, cluster.address]
    for _ in range(3):
        with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == b"begun\n"
            assert client.cluster_status().executors[0].running_requests > 0
            process.kill()
    assert_nothing_is_left(client, requests, greedy_tokens[0])


def test_abort_of_unknown_requests_is_ignored(client: Client) -> None:
    client.abort("nobody", "", "x" * 128)
