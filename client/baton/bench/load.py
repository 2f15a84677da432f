"""Offers requests to a cluster and records what their callers see of them."""

import asyncio
import contextlib
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from baton.aio import AsyncClient
from baton.bench.arrivals import arrival_times
from baton.bench.records import CUT_OFF, OK, ClosedLoop, Load, OpenLoop, Record, Replay, RunResult
from baton.bench.workload import BenchRequest, Workload
from baton.errors import BatonError

_ARRIVALS = 3  # root of the random stream of arrivals


@dataclass(frozen=True, slots=True)
class Extent:
    """When to send no more: after so many requests, or so many seconds; None = no such limit."""

    num_requests: int | None
    seconds: float | None


class Sender:
    """Sends requests over some connections in turn.

    Args:
        clients: one connection each; a scheduler with several api processes needs several.
        temperature: 0 = greedy.
        timeout: seconds for each request; None = no limit.
    """

    def __init__(self, clients: Sequence[AsyncClient], temperature: float, timeout: float | None) -> None:
        self._clients = itertools.cycle(clients)
        self._temperature = temperature
        self._timeout = timeout

    async def send(self, request: BenchRequest, due: float, elapsed: Callable[[], float]) -> Record:
        """Sends a request and reads its stream to the end. Being cancelled is an end like others."""
        sent = elapsed()
        arrivals: list[tuple[float, int]] = []
        status, message, usage = OK, "", None
        try:
            stream = next(self._clients).stream(
                request.prompt,
                max_tokens=request.output_tokens,
                ignore_eos=True,
                temperature=self._temperature,
                timeout=self._timeout,
            )
            async for delta in stream:
                if delta.token_ids:
                    arrivals.append((elapsed(), len(delta.token_ids)))  # noqa: PERF401 - an error must not undo it
            usage = stream.completion.usage
        except BatonError as error:
            status, message = error.code or type(error).__name__, error.message
        except asyncio.CancelledError:
            status = CUT_OFF
        return Record(due, sent, tuple(arrivals), elapsed(), status, message, usage)


async def run_load(
    sender: Sender,
    load: Load,
    workload: Workload,
    *,
    run: int,
    seed: int,
    extent: Extent,
    stop: asyncio.Event,
    on_end: Callable[[Record], None],
) -> RunResult:
    """Sends a run's requests and waits for their ends; ``stop`` cuts off what has not ended.

    Args:
        run: which one; see ``Workload.requests``.
        seed: of the arrivals.
        on_end: called with each request that has ended.
    """
    start = time.perf_counter()
    records: list[Record] = []

    def elapsed() -> float:
        return time.perf_counter() - start

    async def send(request: BenchRequest, due: float) -> None:
        record = await sender.send(request, due, elapsed)
        records.append(record)
        on_end(record)

    requests = itertools.islice(workload.requests(run), extent.num_requests)
    if isinstance(load, ClosedLoop):

        async def ask_again_and_again() -> None:
            for request in requests:
                if stop.is_set() or (extent.seconds is not None and elapsed() >= extent.seconds):
                    return
                await send(request, elapsed())

        tasks = [asyncio.create_task(ask_again_and_again()) for _ in range(load.concurrency)]
    else:
        tasks = []
        for due, request in zip(_times(load, workload, run, seed), requests, strict=False):
            if extent.seconds is not None and due >= extent.seconds:
                break
            if await _stopped(stop, due - elapsed()):
                break
            tasks.append(asyncio.create_task(send(request, due)))
    await _finish(tasks, stop)
    return RunResult(load, tuple(records), max((record.ended for record in records), default=0.0))


def _times(load: OpenLoop | Replay, workload: Workload, run: int, seed: int) -> Iterator[float]:
    if isinstance(load, OpenLoop):
        return arrival_times(load.arrivals, load.rate, np.random.default_rng([seed, _ARRIVALS, run]))
    assert workload.offsets is not None
    return iter(workload.offsets)


async def _stopped(stop: asyncio.Event, delay: float) -> bool:
    """Whether ``stop`` is set, now or within ``delay`` seconds."""
    if delay <= 0:
        await asyncio.sleep(0)  # let those that were sent begin
    else:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(delay):
                await stop.wait()
    return stop.is_set()


async def _finish(tasks: Sequence["asyncio.Task[None]"], stop: asyncio.Event) -> None:
    """Waits for all tasks; cancels them when ``stop`` is set. Raises what a task raises."""
    everything = asyncio.gather(*tasks, return_exceptions=True)
    stopping = asyncio.create_task(stop.wait())
    await asyncio.wait((everything, stopping), return_when=asyncio.FIRST_COMPLETED)
    stopping.cancel()
    if not everything.done():
        for task in tasks:
            task.cancel()
    for result in await everything:
        if isinstance(result, Exception):
            raise result
