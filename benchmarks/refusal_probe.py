"""How long a refusal takes, as one caller sees it who has nothing else to do.

``python -m benchmarks.refusal_probe HOST:PORT`` reads a number of seconds from stdin, asks every so often for so long,
hangs up where it is taken, and prints one JSON line. A load generator cannot tell: that thousands of calls wait for it
is in what it measures.
"""

import argparse
import asyncio
import json
import sys
import time

import grpc

from baton.channel import SERVICE
from benchmarks.figures import percentile, run_main
from benchmarks.grpc_calls import connect, encode_request
from benchmarks.workloads import Request
from scheduler_service.process import die_with_parent

_REQUEST = encode_request(Request([5, 6, 7, 8], 4))


async def probe(address: str, seconds: float, interval: float) -> list[float]:
    """Milliseconds from request to refusal, of each call that was refused."""
    waits: list[float] = []
    until = time.perf_counter() + seconds
    async with connect(address) as channel:
        stub = channel.unary_stream(f"/{SERVICE}/GenerateStream")
        while time.perf_counter() < until:
            sent = time.perf_counter()
            call = stub(_REQUEST)
            try:
                await call.read()  # the beginning of an answer
                call.cancel()
            except grpc.aio.AioRpcError:
                waits.append((time.perf_counter() - sent) * 1e3)
            await asyncio.sleep(interval)
    return waits


def main() -> None:
    """Probe once."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("address", help="HOST:PORT of a scheduler")
    parser.add_argument("--interval", type=float, default=0.02, help="seconds between calls")
    args = parser.parse_args()
    die_with_parent()
    for line in sys.stdin:
        waits = asyncio.run(probe(args.address, float(line), args.interval))
        figures = {f"p{percent}_ms": percentile(waits, percent) for percent in (50, 99, 100)}
        print(json.dumps({"refusals": len(waits), **figures}), flush=True)


if __name__ == "__main__":
    run_main(main)
