"""What happens when callers ask for three times what a cluster can give: it gives all it can, and refuses at once.

First the peak: closed loops of growing concurrency, of which the best one's goodput counts. Then an open loop of
Poisson arrivals at three times that rate. Requests that are taken must end as they do when nobody else asks. The others
must be refused with RESOURCE_EXHAUSTED, with a hint when to come back, and at once: the server's own histogram tells
how long it took from a request's receipt to its status. The executor has one thread, the load generator is niced.
Exit code 1 when anything is missed.
"""

import argparse
import asyncio
import itertools
import os
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import grpc
import numpy as np
from google.rpc import error_details_pb2, status_pb2

from baton import ClusterOptions, LocalCluster
from baton.bench.arrivals import Arrivals, arrival_times
from baton.channel import SERVICE
from baton_protos import generation_pb2 as pb
from benchmarks.checkpoints import DEFAULT_MODELS, cached_checkpoint
from benchmarks.environment import environment
from benchmarks.figures import emit, note, run_main
from benchmarks.grpc_calls import connect
from benchmarks.machine import ForeignLoad
from benchmarks.ports import free_port
from benchmarks.processes import Child, python_module
from benchmarks.scraping import Metrics

_LEAST_SHARE = 0.95
_REFUSAL_SECONDS = 0.01
_NICENESS = 10
_CONNECTIONS = 4
_PROMPTS = 16
_TOKENS = 128
_PROBE_SECONDS = 10.0
_KV_BLOCKS = 4000
_DETAILS = "grpc-status-details-bin"
_PROMPT = (
    '"""Module {number}."""\n\nimport json\n\n\ndef read_{number}(path, size={number}):\n    with open(path) as file:\n'
)


@dataclass(frozen=True, slots=True)
class Ended:
    """How one call ended. Seconds of one clock, ``status`` empty for those that were answered.

    Attributes:
        arrivals: when tokens came, and how many.
        is_hinted: whether a refusal says when to come back.
    """

    number: int
    sent: float
    ended: float
    tokens: tuple[int, ...]
    arrivals: tuple[tuple[float, int], ...]
    status: str
    is_hinted: bool


class Caller:
    """Sends the same few requests again and again, over some connections, and looks into answers afterwards."""

    def __init__(self, channels: Sequence[grpc.aio.Channel]) -> None:
        self._stubs = itertools.cycle([channel.unary_stream(f"/{SERVICE}/GenerateStream") for channel in channels])

    async def call(self, number: int) -> Ended:
        """Send one and read it to its end."""
        messages: list[tuple[float, bytes]] = []
        status, is_hinted = "", False
        sent = time.perf_counter()
        call = next(self._stubs)(_REQUESTS[number % _PROMPTS])
        try:
            while (message := await call.read()) is not grpc.aio.EOF:
                messages.append((time.perf_counter(), message))
        except grpc.aio.AioRpcError as error:
            status, is_hinted = error.code().name, _is_hinted(error)
        ended = time.perf_counter()
        chunks = [(at, pb.GenerateStreamResponse.FromString(data).chunk.token_ids) for at, data in messages]
        tokens = tuple(token for _, ids in chunks for token in ids)
        arrivals = tuple((at, len(ids)) for at, ids in chunks if ids)
        return Ended(number % _PROMPTS, sent, ended, tokens, arrivals, status, is_hinted)

    async def closed_loop(self, concurrency: int, seconds: float) -> list[Ended]:
        """So many callers, each of whom asks again when it has its answer, for so long."""
        numbers, until = itertools.count(), time.perf_counter() + seconds
        done: list[Ended] = []

        async def ask() -> None:
            while time.perf_counter() < until:
                done.append(await self.call(next(numbers)))

        await asyncio.gather(*(ask() for _ in range(concurrency)))
        return done

    async def open_loop(self, rate: float, seconds: float, seed: int) -> list[Ended]:
        """Poisson arrivals at ``rate`` per second for so long; returns when all of them have ended."""
        began = time.perf_counter()
        calls = []
        for number, due in enumerate(arrival_times(Arrivals.POISSON, rate, np.random.default_rng(seed))):
            if due >= seconds:
                break
            await asyncio.sleep(max(0.0, began + due - time.perf_counter()))
            calls.append(asyncio.create_task(self.call(number)))
        return list(await asyncio.gather(*calls))


def goodput(ended: Sequence[Ended], begin: float, end: float) -> float:
    """Tokens per second that came between two moments, of requests that ended well."""
    inside = (n for one in ended if not one.status for at, n in one.arrivals if begin <= at < end)
    return sum(inside) / (end - begin)


class Overload:
    """Measures on a running cluster."""

    def __init__(self, args: argparse.Namespace, caller: Caller, metrics_port: int, probe: Child) -> None:
        self._args = args
        self._caller = caller
        self._metrics_port = metrics_port
        self._probe = probe

    async def reference(self) -> dict[int, tuple[int, ...]]:
        """What each request gives, one at a time."""
        return {number: (await self._caller.call(number)).tokens for number in range(_PROMPTS)}

    async def peak(self, expected: dict[int, tuple[int, ...]]) -> float:
        """The best goodput of all closed loops, in tokens per second."""
        best = 0.0
        for concurrency in self._args.concurrency:
            load, begin = ForeignLoad(), time.perf_counter()
            done = await self._caller.closed_loop(concurrency, self._args.peak_seconds)
            warm = begin + self._args.settle
            rate = goodput(done, warm, begin + self._args.peak_seconds)
            wrong = sum(one.status != "" or one.tokens != expected[one.number] for one in done)
            emit(
                bench="overload",
                loop="closed",
                concurrency=concurrency,
                goodput_tokens_per_s=round(rate, 1),
                requests=len(done),
                failed_or_different=wrong,
                foreign_cores=load.cores(),
            )
            best = max(best, rate)
        return best

    async def overload(self, peak: float, expected: dict[int, tuple[int, ...]]) -> bool:
        """Offer several times the peak; whether all is as it must be."""
        args = self._args
        rate = args.times * peak / _TOKENS
        note(f"offering {rate:.1f} requests a second for {args.seconds:g} s")
        self._probe.say(str(args.seconds))
        load, begin = ForeignLoad(), time.perf_counter()
        done = await self._caller.open_loop(rate, args.seconds, args.seed)
        reached = goodput(done, begin + args.settle, begin + args.seconds)
        foreign = load.cores()
        taken = [one for one in done if not one.status]
        refused = [one for one in done if one.status]
        different = sum(one.tokens != expected[one.number] for one in taken)
        statuses = Counter(one.status for one in refused)
        hints = sum(one.is_hinted for one in refused)
        server = (await asyncio.to_thread(Metrics, self._metrics_port)).histogram("baton_refusal_seconds")
        counted = max(server.values(), default=0.0)
        share = server[_REFUSAL_SECONDS] / counted if counted else 0.0
        held = (
            reached >= _LEAST_SHARE * peak
            and not different
            and set(statuses) == {grpc.StatusCode.RESOURCE_EXHAUSTED.name}
            and hints == len(refused) <= counted
            and share >= 0.99
        )
        emit(
            bench="overload",
            loop="open",
            offered_requests_per_s=round(rate, 1),
            seconds=args.seconds,
            goodput_tokens_per_s=round(reached, 1),
            share_of_peak=round(reached / peak, 3),
            taken=len(taken),
            different=different,
            refused=statuses,
            hinted=hints,
            refused_within_10_ms_at_server=round(share, 4),
            refusals_of_an_idle_caller=self._probe.json(_PROBE_SECONDS),
            foreign_cores=foreign,
            held=held,
        )
        return held


async def measure(address: str, metrics_port: int, probe: Child, args: argparse.Namespace) -> bool:
    """Print all figures; whether all is as it must be."""
    channels = [connect(address) for _ in range(_CONNECTIONS)]
    try:
        overload = Overload(args, Caller(channels), metrics_port, probe)
        expected = await overload.reference()
        return await overload.overload(await overload.peak(expected), expected)
    finally:
        for channel in channels:
            await channel.close()


def _request(number: int) -> bytes:
    return pb.GenerateRequest(
        text=_PROMPT.format(number=number),
        sampling=pb.SamplingParams(temperature=1.0, top_p=0.95, seed=number),
        stop=pb.StopConditions(max_tokens=_TOKENS, ignore_eos=True),
        output=pb.OutputOptions(prompt_token_ids=False),
    ).SerializeToString()


_REQUESTS = [_request(number) for number in range(_PROMPTS)]


def _is_hinted(error: grpc.aio.AioRpcError) -> bool:
    """Whether there is a RetryInfo with a delay."""
    for key, value in error.trailing_metadata():
        if key == _DETAILS:
            for detail in status_pb2.Status.FromString(value).details:
                hint = error_details_pb2.RetryInfo()
                if detail.Unpack(hint) and hint.retry_delay.ToMilliseconds() > 0:
                    return True
    return False


def main() -> None:
    """Print one JSON line per loop."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", type=Path, help="default: qwen3-small, which keeps the executor busier than the rest"
    )
    parser.add_argument("--times", type=float, default=3.0, help="what is offered, over the peak")
    parser.add_argument("--seconds", type=float, default=40.0, help="of the open loop")
    parser.add_argument("--settle", type=float, default=3.0, help="seconds of each loop that do not count")
    parser.add_argument("--peak-seconds", type=float, default=12.0, help="of each closed loop")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[32, 64], help="of the closed loops")
    parser.add_argument("--rows", type=int, default=32, help="requests that run at a time")
    parser.add_argument("--queue", type=int, default=64, help="requests that may wait")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    emit(**environment(), seed=args.seed)
    metrics_port = free_port()
    options = ClusterOptions(
        model=args.model or cached_checkpoint("qwen3-small", DEFAULT_MODELS),
        port=0,
        threads=1,
        num_blocks=_KV_BLOCKS,
        scheduler_arguments=("--max-queued-requests", str(args.queue), "--metrics-port", str(metrics_port)),
        executor_arguments=("--max-rows", str(args.rows)),
    )
    with LocalCluster(options) as cluster:
        command = python_module("benchmarks.refusal_probe", cluster.address)
        with Child("probe", command, stdin=True) as probe:
            os.nice(_NICENESS)
            held = asyncio.run(measure(cluster.address, metrics_port, probe, args))
    sys.exit(0 if held else 1)


if __name__ == "__main__":
    run_main(main)
