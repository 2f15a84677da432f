"""Many gRPC streams at a time, read as cheaply as Python can: messages are kept as bytes and looked into afterwards.

``python -m benchmarks.stream_client HOST:PORT --streams 256 --seconds 6`` opens all streams, lets them settle,
measures, closes them, and prints one JSON line. It says `measuring` when it begins and `measured` when it is done.
"""

import argparse
import asyncio
import gc
import itertools
import json
import os
import time

import grpc
import numpy as np
from numpy.typing import NDArray

from baton.channel import SERVICE
from baton_protos import generation_pb2 as pb
from benchmarks.environment import cpu_seconds
from benchmarks.figures import percentile, run_main
from benchmarks.grpc_calls import connect, encode_request, gaps_ms
from benchmarks.workloads import Request
from scheduler_service.process import die_with_parent

_SAMPLES_PER_SECOND = 20
_PROMPT = 16

Messages = list[tuple[float, bytes]]


class Readers:
    """One task per stream; ``messages[i]`` are stream i's, with the time of their arrival."""

    def __init__(self, channels: list[grpc.aio.Channel], streams: int, max_tokens: int, *, text: bool) -> None:
        self.messages: list[Messages] = [[] for _ in range(streams)]
        self._tasks = [
            asyncio.create_task(self._read(channel, _request(number, max_tokens, text=text), messages))
            for number, (channel, messages) in enumerate(zip(itertools.cycle(channels), self.messages, strict=False))
        ]

    async def all_running(self, timeout: float) -> None:
        """Return once every stream has tokens.

        Raises:
            TimeoutError: not in time.
            grpc.RpcError: a stream failed.
        """
        async with asyncio.timeout(timeout):
            while min(map(len, self.messages)) < 2:
                self.check()
                await asyncio.sleep(0.02)

    def check(self) -> None:
        """Raise what a stream has raised; a stream that has ended is an error too."""
        for task in self._tasks:
            if task.done():
                task.result()
                raise RuntimeError("a stream ended before the measurement did: ask for fewer seconds or more tokens")

    async def close(self) -> None:
        """Cancel all streams."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _read(self, channel: grpc.aio.Channel, request: bytes, messages: Messages) -> None:
        call = channel.unary_stream(f"/{SERVICE}/GenerateStream")(request)
        clock, keep, read = time.perf_counter, messages.append, call.read
        while (message := await read()) is not grpc.aio.EOF:
            keep((clock(), message))


async def measure(args: argparse.Namespace) -> dict[str, object]:
    """Open, settle, measure, close."""
    channels = [connect(args.address) for _ in range(args.connections)]
    opened = time.perf_counter()
    readers = Readers(channels, args.streams, args.max_tokens, text=args.text)
    await readers.all_running(args.start_limit)
    await asyncio.sleep(args.settle)
    gc.freeze()
    print("measuring", flush=True)
    cpu, begin = cpu_seconds(os.getpid()), time.perf_counter()
    await asyncio.sleep(args.seconds)
    cpu, end = cpu_seconds(os.getpid()) - cpu, time.perf_counter()
    print("measured", flush=True)
    readers.check()
    await readers.close()
    for channel in channels:
        await channel.close()
    return {**figures(readers.messages, opened, begin, end), "client_cpu_share": round(cpu / (end - begin), 3)}


def figures(streams: list[Messages], opened: float, begin: float, end: float) -> dict[str, object]:
    """What arrived between two moments, and how evenly. ``opened``: when the streams were."""
    arrivals = [[(moment, _num_tokens(data)) for moment, data in messages[1:]] for messages in streams]
    inside = [[one for one in stream if begin <= one[0] < end] for stream in arrivals]
    tokens = [sum(count for _, count in stream) for stream in inside]
    messages = sum(map(len, inside))
    gaps = [gap for stream in inside for gap in gaps_ms(stream)]
    waits = [(b - a) * 1e3 for stream in inside for (a, _), (b, _) in itertools.pairwise(stream)]
    lags = _lags(arrivals, begin, end)
    return {
        "tokens_per_s": round(sum(tokens) / (end - begin)),
        "messages_per_s": round(messages / (end - begin)),
        "tokens_per_message": round(sum(tokens) / max(1, messages), 2),
        "itl_p50_ms": percentile(gaps, 50),
        "itl_p99_ms": percentile(gaps, 99),
        "message_gap_p99_ms": percentile(waits, 99),
        "message_gap_max_ms": percentile(waits, 100),
        "lag_p50_tokens": round(float(np.median(lags))),
        "lag_max_tokens": round(float(lags.max())),
        "slowest_stream_share": round(min(tokens) / max(1, *tokens), 3),
        "all_started_s": round(max(stream[0][0] for stream in arrivals) - opened, 3),
        "tokens": sum(tokens),
        "messages": messages,
    }


def _lags(arrivals: list[list[tuple[float, int]]], begin: float, end: float) -> NDArray[np.float64]:
    """How many tokens the slowest stream is behind the fastest, at moments between ``begin`` and ``end``.

    Streams begin one after another: the distance that a stream keeps most of the time is none of its lag.
    """
    moments = np.arange(begin, end, 1 / _SAMPLES_PER_SECOND)
    counts = []
    for stream in arrivals:
        times = np.array([moment for moment, _ in stream])
        totals = np.concatenate([[0], np.cumsum([count for _, count in stream])])
        counts.append(totals[np.searchsorted(times, moments)])
    ahead = np.array(counts) - np.mean(counts, axis=0)
    lags: NDArray[np.float64] = np.ptp(ahead - np.median(ahead, axis=1, keepdims=True), axis=0)
    return lags


def _request(number: int, max_tokens: int, *, text: bool) -> bytes:
    return encode_request(Request([3 + number % 4000] * _PROMPT, max_tokens), text=text)


def _num_tokens(data: bytes) -> int:
    return len(pb.GenerateStreamResponse.FromString(data).chunk.token_ids)


def main() -> None:
    """Measure once."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("address", help="HOST:PORT of a scheduler")
    parser.add_argument("--streams", type=int, default=256)
    parser.add_argument("--connections", type=int, default=16)
    parser.add_argument("--max-tokens", type=int, default=2000, help="of each stream: more than it gets to see")
    parser.add_argument("--settle", type=float, default=1.0, help="seconds before the measurement")
    parser.add_argument("--seconds", type=float, default=6.0, help="seconds of the measurement")
    parser.add_argument("--start-limit", type=float, default=30.0, help="seconds until every stream must have tokens")
    parser.add_argument("--text", action=argparse.BooleanOptionalAction, default=False, help="ask for text too")
    args = parser.parse_args()
    die_with_parent()
    print(json.dumps(asyncio.run(measure(args))), flush=True)


if __name__ == "__main__":
    run_main(main)
