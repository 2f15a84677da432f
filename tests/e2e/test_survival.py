"""What operators do to executors, and what becomes of a scheduler whose processes die."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from baton import (
    AsyncClient,
    Client,
    Completion,
    ExecutorNotFoundError,
    ExecutorState,
    LocalCluster,
    ResumePolicy,
    UnavailableError,
)
from baton.checkpoints import TINY_PYTHON
from tests.e2e.harness import descendants, eventually, is_idle, options

PROMPT = "def fibonacci(n):"
TOKENS = 300
STREAMS = 12
BACK_SECONDS = 60.0


@pytest.fixture(scope="module")
def pair() -> Iterator[LocalCluster]:
    """Two executors; leave them serving and idle."""
    with LocalCluster(options(TINY_PYTHON, executors=2)) as running:
        yield running


async def streamed(address: str, while_running: "asyncio.Event | None" = None) -> list[Completion]:
    """Some seeded streams; ``while_running`` is set once each of them has begun."""
    begun = 0

    async def read(client: AsyncClient, seed: int) -> Completion:
        nonlocal begun
        async with client.stream(PROMPT, max_tokens=TOKENS, seed=seed, ignore_eos=True) as stream:
            async for delta in stream:
                if delta.token_index == 0 and delta.token_ids:
                    begun += 1
                    if begun == STREAMS and while_running is not None:
                        while_running.set()
            return stream.completion

    async with AsyncClient(address) as client:
        return list(await asyncio.gather(*(read(client, seed) for seed in range(STREAMS))))


def states(client: Client) -> dict[str, ExecutorState]:
    return {one.executor_id: one.state for one in client.cluster_status().executors}


def running(client: Client) -> dict[str, int]:
    return {one.executor_id: one.running_requests for one in client.cluster_status().executors}


async def streamed_with(cluster: LocalCluster, action: "list[tuple[str, str]]") -> list[Completion]:
    """The streams, while executors are paused, resumed or drained as soon as all of them run."""
    begun = asyncio.Event()
    task = asyncio.create_task(streamed(cluster.address, begun))
    await begun.wait()
    with Client(cluster.address) as client:
        for verb, executor_id in action:
            await asyncio.to_thread(getattr(client, f"{verb}_executor"), executor_id)
    return await task


def test_a_drained_executor_hands_its_streams_over_and_leaves(pair: LocalCluster) -> None:
    expected = asyncio.run(streamed(pair.address))
    pid = pair.executor_pids()["executor-0"]
    after = asyncio.run(streamed_with(pair, [("drain", "executor-0")]))
    assert [one.token_ids for one in after] == [one.token_ids for one in expected]
    assert [one.text for one in after] == [one.text for one in expected]
    with Client(pair.address) as client:
        assert eventually(lambda: pair.executor_pids().get("executor-0") not in {pid, None}, BACK_SECONDS)
        assert eventually(lambda: len(states(client)) == 2, BACK_SECONDS)
        assert is_idle(client.cluster_status())


def test_a_paused_executor_gets_nothing_new(pair: LocalCluster) -> None:
    with Client(pair.address) as client:
        assert set(states(client).values()) == {ExecutorState.SERVING}
        client.pause_executor("executor-1")
        assert states(client)["executor-1"] is ExecutorState.PAUSED
        with client.stream(PROMPT, max_tokens=TOKENS, ignore_eos=True) as stream:
            next(stream)
            assert running(client) == {"executor-0": 1, "executor-1": 0}
        client.resume_executor("executor-1")
        assert states(client)["executor-1"] is ExecutorState.SERVING
        with pytest.raises(ExecutorNotFoundError, match="nobody"):
            client.drain_executor("nobody")


def test_the_command_line_does_the_same(pair: LocalCluster) -> None:
    def baton(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "baton.cli", *arguments, "--server", pair.address]
        command[1:3] = ["-c", "from baton.cli import main; main()"]
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)

    assert baton("executors", "pause", "executor-0").returncode == 0
    listed = baton("executors").stdout.splitlines()
    assert [line.split()[:2] for line in listed[1:]] == [["executor-0", "paused"], ["executor-1", "serving"]]
    assert baton("executors", "resume", "executor-0").returncode == 0
    refused = baton("executors", "resume", "nobody")
    assert (refused.returncode, refused.stderr) == (1, "error: there is no executor 'nobody'\n")


def test_the_last_executor_finishes_its_work_before_it_leaves() -> None:
    with LocalCluster(options(TINY_PYTHON)) as cluster, Client(cluster.address) as client:
        expected = client.generate(PROMPT, max_tokens=TOKENS, seed=3, ignore_eos=True)
        with client.stream(PROMPT, max_tokens=TOKENS, seed=3, ignore_eos=True) as stream:
            next(stream)
            os.kill(cluster.executor_pids()["executor-0"], signal.SIGTERM)
            assert stream.result().token_ids == expected.token_ids


def test_streams_fail_at_once_when_the_engine_dies(tmp_path: Path) -> None:
    cluster = LocalCluster(options(TINY_PYTHON))
    with cluster, Client(cluster.address, resume=ResumePolicy(patience=0.0)) as client:
        stream = client.stream(PROMPT, max_tokens=1900, ignore_eos=True)
        next(stream)
        (engine,) = [pid for pid in descendants(cluster.scheduler_pid) if "scheduler_service.engine" in command(pid)]
        os.kill(engine, signal.SIGKILL)
        began = time.monotonic()
        with pytest.raises(UnavailableError):
            stream.result()
        assert time.monotonic() - began < 10.0
        assert eventually(lambda: cluster.failure is not None, 10.0)


def test_streams_survive_their_api_process() -> None:
    with LocalCluster(options(TINY_PYTHON)) as cluster, Client(cluster.address) as client:
        expected = client.generate(PROMPT, max_tokens=1500, seed=3, ignore_eos=True)
        with client.stream(PROMPT, max_tokens=1500, seed=3, ignore_eos=True) as stream:
            next(stream)
            (api,) = [pid for pid in descendants(cluster.scheduler_pid) if "scheduler_service.api" in command(pid)]
            os.kill(api, signal.SIGKILL)
            completion = stream.result()
        assert stream.interruptions == 1
        assert (completion.token_ids, completion.text) == (expected.token_ids, expected.text)
        assert completion.exact


def command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except OSError:
        return ""
