"""How soon a scheduler notices that an executor is frozen, cut off or stuck, and how soon a drained one has left.

Real processes: two executors under load, of which the busier one is frozen (SIGSTOP), cut off by a proxy that lets
nothing through and breaks no connection, stopped inside a kernel while its heartbeats go on, or sent SIGTERM. Times run
from the fault to the moment that the scheduler's log gives for the loss, or to the end of the drained process. Every
stream must be what it is without faults. Exit code 1 when a bound is missed, or a stream differs.
"""

import argparse
import asyncio
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path

from baton import AsyncClient
from baton.checkpoints import TINY_PYTHON
from benchmarks.environment import environment
from benchmarks.figures import emit, median, note, run_main
from benchmarks.kill_test.cases import Case, cases
from benchmarks.kill_test.cluster import ExecutorPlace, KillableCluster, Settings
from benchmarks.kill_test.harms import LASTING
from benchmarks.kill_test.run import undisturbed
from benchmarks.kill_test.scheduler_log import SchedulerLog
from benchmarks.kill_test.streams import Load, Output, Stream
from benchmarks.kill_test.verdict import mismatched
from benchmarks.kill_test.view import ClusterView
from benchmarks.processes import ProcessFailedError

_SLACK = 0.5  # seconds that noticing may take beyond what the design waits for
_LEASE = 2.0  # the scheduler's default
_STEP_PATIENCE = 3.0  # for steps that are planned to take less than a tenth of it, as all of this model do
_DRAIN = 10.0
_BOUNDS = {"stop": _LEASE + _SLACK, "silence": _LEASE + _SLACK, "hang": _STEP_PATIENCE + _SLACK, "term": _DRAIN}
_REASONS = {"stop": "its lease ran out", "silence": "its lease ran out", "hang": "a step has been running"}
_LEAST_ROWS = 16
_STREAMS = 40  # on two executors
_LOST = "executor lost"
_READY_SECONDS = 60.0
_PATIENCE = 45.0  # longer than the watch waits for a step of a size that it has not seen yet
_LEAST_TOKENS = 20  # of every stream: steps of this size have been seen, and there are no prompts any more
_POLL = 0.005


@dataclass(slots=True)
class Found:
    """What came of one kind of fault. ``seconds``: until it was noticed, one per repetition."""

    seconds: list[float] = field(default_factory=list)
    reasons: Counter[str] = field(default_factory=Counter)
    rows: list[int] = field(default_factory=list)
    streams: list[Stream] = field(default_factory=list)


class Detection:
    """Faults on a running cluster, one after another."""

    def __init__(self, cluster: KillableCluster, view: ClusterView, log: SchedulerLog) -> None:
        self._cluster = cluster
        self._view = view
        self._log = log

    async def repeat(self, kind: str, times: int, clients: Sequence[AsyncClient], asked: Sequence[Case]) -> Found:
        """Do it so often, each time in the middle of ``asked``."""
        found = Found()
        for number in range(times):
            note(f"{kind}, {number + 1} of {times}")
            load = Load(asked, len(asked), len(asked))
            running = asyncio.create_task(load.run(clients))
            try:
                place, rows = await self._victim(load)
                found.rows.append(rows)
                self._log.read()  # what was lost before does not count
                seconds = await (self._drain(place) if kind == "term" else self._notice(kind, place, found))
                found.seconds.append(seconds)
                await self._view.all_back(len(self._cluster.executors))
                await running
            finally:
                running.cancel()
            found.streams += load.done
        return found

    async def _victim(self, load: Load) -> tuple[ExecutorPlace, int]:
        """The busier executor, once it has rows enough and every stream has tokens enough."""
        while True:
            name, rows = await self._view.busiest()
            if load.is_over:
                raise ProcessFailedError(f"no executor ever had {_LEAST_ROWS} rows: streams are too short")
            if rows >= _LEAST_ROWS and load.live and min(stream.tokens for stream in load.live) >= _LEAST_TOKENS:
                return next(one for one in self._cluster.executors if one.executor_id == name), rows
            await asyncio.sleep(_POLL)

    async def _notice(self, kind: str, place: ExecutorPlace, found: Found) -> float:
        async with LASTING[kind](place):
            began = time.time()  # as the log tells time
            while time.time() < began + _PATIENCE:
                for line in self._log.read():
                    if line.message.startswith(_LOST) and line.fields["executor_id"] == place.executor_id:
                        found.reasons[_plain(line.fields["reason"])] += 1
                        return line.at - began
                await asyncio.sleep(_POLL)
        raise ProcessFailedError(f"{kind}: nobody noticed within {_PATIENCE:g} s")

    async def _drain(self, place: ExecutorPlace) -> float:
        began = time.monotonic()
        place.signal(signal.SIGTERM)
        while not place.is_gone():
            if time.monotonic() > began + _PATIENCE:
                raise ProcessFailedError(f"a drained executor was still there after {_PATIENCE:g} s")
            await asyncio.sleep(_POLL)
        took = time.monotonic() - began
        self._cluster.start_executor(place)
        return took


async def measure(cluster: KillableCluster, kinds: Sequence[str], times: int, asked: Sequence[Case]) -> bool:
    """Print a figure per kind; whether all is as it must be."""
    await cluster.start()
    log = cluster.schedulers[0].log
    assert log is not None
    view = ClusterView(cluster.addresses)
    async with AsyncExitStack() as stack:
        stack.push_async_callback(cluster.stop_proxies)
        stack.push_async_callback(view.close)
        clients = [await stack.enter_async_context(AsyncClient(cluster.addresses)) for _ in range(4)]
        await clients[0].wait_ready(_READY_SECONDS)
        await view.all_back(len(cluster.executors))
        expected = await undisturbed(clients, asked, len(asked))
        detection = Detection(cluster, view, log)
        return all([_judge(kind, await detection.repeat(kind, times, clients, asked), expected) for kind in kinds])


def _judge(kind: str, found: Found, expected: dict[int, Output]) -> bool:
    """Print what came of one kind; whether it is as it must be."""
    failed = Counter(stream.error for stream in found.streams if stream.error)
    different = len(mismatched(found.streams, expected))
    slowest, bound, reason = max(found.seconds), _BOUNDS[kind], _REASONS.get(kind)
    held = slowest <= bound and not failed and not different and set(found.reasons) <= {reason}
    emit(
        bench="detection",
        fault=kind,
        repetitions=len(found.seconds),
        median_s=median(found.seconds),
        max_s=round(slowest, 3),
        bound_s=bound,
        reasons=found.reasons or None,
        least_rows=min(found.rows),
        streams=len(found.streams),
        failed=dict(failed),
        mismatched=different,
        held=held,
    )
    return held


def _plain(reason: str) -> str:
    """Without the seconds that it names."""
    return reason.partition(" for ")[0]


def main() -> None:
    """Print one JSON line per kind of fault."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=TINY_PYTHON)
    parser.add_argument("--kinds", nargs="+", choices=_BOUNDS, default=list(_BOUNDS))
    parser.add_argument("--repetitions", type=int, default=10, help="of each kind")
    parser.add_argument("--max-tokens", type=int, default=400, help="of the shortest streams")
    args = parser.parse_args()
    emit(**environment(), repetitions=args.repetitions)
    with tempfile.TemporaryDirectory(prefix="baton-") as logs:
        settings = Settings(
            model=args.model,
            executors=2,
            num_blocks=2000,
            max_rows=64,
            log_level="warning",
            proxies="silence" in args.kinds,
            logs=Path(logs),
        )
        with KillableCluster(settings) as cluster:
            asked = cases(args.max_tokens)[:_STREAMS]
            held = asyncio.run(measure(cluster, args.kinds, args.repetitions, asked))
    sys.exit(0 if held else 1)


if __name__ == "__main__":
    run_main(main)
