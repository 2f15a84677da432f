"""A whole benchmark: connections, warm-up, one run for each load, and Ctrl-C at any moment."""

import asyncio
import signal
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass

from baton.aio import AsyncClient
from baton.bench.load import Extent, Sender, run_load
from baton.bench.records import OK, ClosedLoop, Load, Record, RunResult
from baton.bench.workload import Workload
from baton.credentials import Credentials
from baton.errors import BatonError
from baton.stream_log import ResumePolicy

_WARM_UP_RUN = 0  # its prompts are not those of any run that is measured
_WARM_UP_CONCURRENCY = 8
_NO_RESUMING = ResumePolicy(attempts=1, patience=0.0)  # a failure is a figure, not a pause


@dataclass(frozen=True, slots=True)
class Plan:
    """What to do.

    Attributes:
        loads: one run each, in this order.
        extent: of every run.
        warm_up: so many requests before the first run, which no figure knows.
        connections: to the scheduler.
        temperature: of all requests; 0 = greedy.
        timeout: seconds for each request; None = no limit.
        seed: of the arrivals.
    """

    loads: Sequence[Load]
    extent: Extent
    warm_up: int
    connections: int
    temperature: float
    timeout: float | None
    seed: int


@dataclass(frozen=True, slots=True)
class Session:
    """The runs that were made; ``interrupted``: by Ctrl-C, and the last one may be incomplete."""

    results: tuple[RunResult, ...]
    interrupted: bool


def run_session(
    target: str, credentials: Credentials | None, plan: Plan, workload: Workload, on_end: Callable[[Record], None]
) -> Session:
    """Runs a plan. The first Ctrl-C ends it with what was measured so far, the second one at once.

    Args:
        target: the scheduler's gRPC address.
        credentials: as for ``AsyncClient``.
        on_end: called with each measured request that has ended.

    Raises:
        BatonError: no request of the warm-up ended well.
        KeyboardInterrupt: Ctrl-C came twice.
    """
    return asyncio.run(_run_session(target, credentials, plan, workload, on_end))


async def _run_session(
    target: str, credentials: Credentials | None, plan: Plan, workload: Workload, on_end: Callable[[Record], None]
) -> Session:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()

    def interrupt() -> None:
        stop.set()
        loop.remove_signal_handler(signal.SIGINT)

    loop.add_signal_handler(signal.SIGINT, interrupt)
    results = []
    async with AsyncExitStack() as stack:
        clients = [
            await stack.enter_async_context(AsyncClient(target, credentials=credentials, resume=_NO_RESUMING))
            for _ in range(plan.connections)
        ]
        sender = Sender(clients, plan.temperature, plan.timeout)
        if plan.warm_up:
            await _warm_up(sender, plan, workload, stop)
        for number, load in enumerate(plan.loads, start=_WARM_UP_RUN + 1):
            if stop.is_set():
                break
            results.append(
                await run_load(
                    sender, load, workload, run=number, seed=plan.seed, extent=plan.extent, stop=stop, on_end=on_end
                )
            )
    return Session(tuple(results), stop.is_set())


async def _warm_up(sender: Sender, plan: Plan, workload: Workload, stop: asyncio.Event) -> None:
    result = await run_load(
        sender,
        ClosedLoop(min(_WARM_UP_CONCURRENCY, plan.warm_up)),
        workload,
        run=_WARM_UP_RUN,
        seed=plan.seed,
        extent=Extent(plan.warm_up, None),
        stop=stop,
        on_end=lambda _: None,
    )
    if not stop.is_set() and not any(record.status == OK for record in result.records):
        failed = result.records[0]
        raise BatonError(f"no request of the warm-up ended well: {failed.error}", code=failed.status)
