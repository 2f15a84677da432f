"""One run: every case without faults, then many streams with them."""

import asyncio
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass

from baton import AsyncClient, BatonError
from benchmarks.figures import note
from benchmarks.kill_test.cases import Case
from benchmarks.kill_test.cluster import KillableCluster
from benchmarks.kill_test.faults import Faults
from benchmarks.kill_test.streams import Load, Output, accepted
from benchmarks.kill_test.verdict import Verdict, judge

_WAIT_SECONDS = 60.0
_CLIENTS = 4
_LEAST_ROWS = 8


@dataclass(frozen=True, slots=True)
class Plan:
    """What to do: ``faults`` of these ``kinds``, spread over ``streams`` streams, ``concurrency`` at a time.

    ``gap``: least seconds between the end of a fault and the next one. A request whose executors die in a row, without
    progress in between, is suspected to be the reason and has to wait until it can run alone.
    """

    cases: Sequence[Case]
    streams: int
    faults: int
    kinds: Sequence[str]
    concurrency: int
    seed: int
    gap: float = 0.0


async def run(cluster: KillableCluster, plan: Plan) -> tuple[Verdict, dict[str, str]]:
    """The verdict, and the cases that the cluster refused, with its reasons.

    Raises:
        BatonError: a stream failed before there was any fault.
    """
    await cluster.start()
    async with AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(AsyncClient(cluster.addresses)) for _ in range(_CLIENTS)]
        await clients[0].wait_ready(_WAIT_SECONDS)
        chosen, refused = await accepted(clients[0], plan.cases)
        note(f"{len(chosen)} cases without faults")
        expected = await undisturbed(clients, chosen, plan.concurrency)
        note(f"{plan.streams} streams, {plan.faults} faults")
        load = Load(chosen, plan.streams, plan.concurrency)
        harm = Faults(cluster, load, plan.seed, _LEAST_ROWS, plan.gap)
        doing = asyncio.create_task(harm.run(list(plan.kinds), plan.faults))
        try:
            await load.run(clients)
            await doing
        finally:
            doing.cancel()
            await harm.close()
            await cluster.stop_proxies()
        return judge(load.done, expected, chosen, harm.records), refused


async def undisturbed(clients: Sequence[AsyncClient], chosen: Sequence[Case], concurrency: int) -> dict[int, Output]:
    """What each case gives when nothing goes wrong, by its index.

    Raises:
        BatonError: a stream failed.
    """
    load = Load(chosen, len(chosen), concurrency)
    await load.run(clients)
    failed = [f"{chosen[stream.case].name}: {stream.error}" for stream in load.done if stream.error]
    if failed:
        raise BatonError(f"without any fault {len(failed)} streams failed, such as {failed[0]}")
    return {stream.case: stream.output for stream in load.done if stream.output is not None}
