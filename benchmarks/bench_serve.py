"""What callers get: workloads through gRPC against a whole cluster on this machine, one executor on all cores.

Prompts are token ids, decoding is greedy and goes on past end-of-sequence ids, no text. Every answer's length is
checked. Both ways of calling take turns in one run: `stream` delivers tokens as they come, `generate` answers once.
"""

import argparse
import asyncio
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import grpc

from baton import ClusterOptions, LocalCluster
from benchmarks.checkpoints import DTYPE, add_model_options, cached_checkpoint
from benchmarks.environment import environment
from benchmarks.figures import emit, median, run_main
from benchmarks.grpc_calls import Answer, connect, generate_all, latencies, stream_all
from benchmarks.machine import ForeignLoad, peak_rss_mb, tree_seconds, usable_cores
from benchmarks.workloads import WARM_UP, WORKLOADS, Workload

CALLS = {"stream": stream_all, "generate": generate_all}
CALLS_IN_ORDER = list(CALLS)


@dataclass(frozen=True, slots=True)
class Run:
    """One workload, once. ``wall`` in seconds; ``cpu``: seconds that each part of the system used; ``foreign``: cores
    that others kept busy meanwhile.
    """

    wall: float
    cpu: dict[str, float]
    prompt_tokens: int
    answers: list[Answer]
    foreign: float | None

    @property
    def out_tokens(self) -> int:
        return sum(answer.num_tokens for answer in self.answers)


def cluster_options(checkpoint: Path, threads: int, kv_gib: int, max_batched_tokens: int) -> ClusterOptions:
    """One executor on a free port."""
    return ClusterOptions(
        model=checkpoint,
        port=0,
        threads=threads,
        dtype=DTYPE,
        kv_memory=f"{kv_gib}GiB",
        max_batched_tokens=max_batched_tokens,
    )


class Usage:
    """What a cluster's processes use, by part: the scheduler (engine and api), the executor, and this process."""

    def __init__(self, cluster: LocalCluster) -> None:
        (executor,) = cluster.executor_pids().values()
        self._pids = {"scheduler": cluster.scheduler_pid, "executor": executor}

    def cpu(self) -> dict[str, float]:
        """CPU seconds so far."""
        return {**{part: tree_seconds(pid) for part, pid in self._pids.items()}, "client": time.process_time()}

    def peak_rss_mb(self) -> dict[str, float]:
        """The most memory so far."""
        return {f"{part}_peak_rss_mb": peak_rss_mb(pid) for part, pid in self._pids.items()}


async def run_once(
    channel: grpc.aio.Channel, call: str, workload: Workload, number: int, usage: Usage | None = None
) -> Run:
    """Run a workload with the contents of run ``number``."""
    bursts = workload.bursts(number)
    load, before = ForeignLoad(), {} if usage is None else usage.cpu()
    began = time.perf_counter()
    answers: list[Answer] = []
    for burst in bursts:
        answers += await CALLS[call](channel, burst)
    wall = time.perf_counter() - began
    cpu = {} if usage is None else {part: seconds - before[part] for part, seconds in usage.cpu().items()}
    return Run(wall, cpu, sum(len(one.prompt) for burst in bursts for one in burst), answers, load.cores())


async def measure(
    cluster: LocalCluster, shape: str, workloads: Sequence[Workload], calls: Sequence[str], runs: int
) -> None:
    """Print a figure per workload and way of calling."""
    usage = Usage(cluster)
    async with connect(cluster.address) as channel:
        for call in calls:
            await run_once(channel, call, WARM_UP, CALLS_IN_ORDER.index(call))
        for workload in workloads:
            done: dict[str, list[Run]] = {call: [] for call in calls}
            for number in range(runs):
                for call in calls if number % 2 == 0 else reversed(calls):
                    contents = number * len(CALLS) + CALLS_IN_ORDER.index(call)
                    done[call].append(await run_once(channel, call, workload, contents, usage))
            for call, runs_of_call in done.items():
                ratio = median(a.wall / b.wall for a, b in zip(done[calls[0]], runs_of_call, strict=True))
                versus = {f"speed_over_{calls[0]}": ratio} if call != calls[0] else {}
                figures = {**summary(runs_of_call), **usage.peak_rss_mb()}
                emit(bench="serve", shape=shape, workload=workload.name, call=call, **versus, **figures)


def summary(runs: Sequence[Run]) -> dict[str, object]:
    """Medians over runs of one workload."""
    wall = statistics.median(run.wall for run in runs)
    out_tokens, prompt_tokens = runs[0].out_tokens, runs[0].prompt_tokens
    decodes_alone = len(runs[0].answers) == 1 and out_tokens > 1
    figures: dict[str, object] = {
        "runs": len(runs),
        "wall_s": round(wall, 4),
        "spread": round((max(run.wall for run in runs) - min(run.wall for run in runs)) / wall, 3),
        "prompt_tokens": prompt_tokens,
        "out_tokens": out_tokens,
        "out_tok_s": round(out_tokens / wall, 1),
        "total_tok_s": round((out_tokens + prompt_tokens) / wall, 1),
        "ms_per_token": round(wall * 1e3 / out_tokens, 3) if decodes_alone else None,
        "prefix_hit_tokens": median((sum(answer.cached_tokens for answer in run.answers) for run in runs), 0),
        "foreign_cores": max((run.foreign for run in runs if run.foreign is not None), default=None),
    }
    for part in runs[0].cpu:
        figures[f"{part}_cpu_us_per_token"] = median((run.cpu[part] * 1e6 / out_tokens for run in runs), 1)
    waits = [asdict(latencies(run.answers)) for run in runs]
    for name in waits[0]:
        known = [one[name] for one in waits if one[name] is not None]
        figures[f"{name}_ms"] = median(known) if known else None
    return figures


def main() -> None:
    """Print one JSON line per shape, workload and way of calling."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_options(parser)
    add_serving_options(parser)
    parser.add_argument("--calls", nargs="+", choices=CALLS, default=list(CALLS))
    args = parser.parse_args()
    emit(**environment("torch", "grpcio", "numpy"), dtype=DTYPE, threads=args.threads)
    for shape in args.shapes:
        checkpoint = cached_checkpoint(shape, args.models)
        options = cluster_options(checkpoint, args.threads, args.kv_gib, args.max_batched_tokens)
        with LocalCluster(options) as cluster:
            workloads = [WORKLOADS[name] for name in args.workloads]
            asyncio.run(measure(cluster, shape, workloads, args.calls, args.runs))


def add_serving_options(parser: argparse.ArgumentParser) -> None:
    """Workloads, runs, threads, memory."""
    listing = "; ".join(f"{workload.name}: {workload.title}" for workload in WORKLOADS.values())
    names = [name for name in WORKLOADS if name != "W1-16"]
    parser.add_argument(
        "--workloads", nargs="+", choices=WORKLOADS, default=names, metavar="W", help=f"{listing} (default: not W1-16)"
    )
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--threads", type=int, default=usable_cores(), help="compute threads (default: all cores)")
    parser.add_argument("--kv-gib", type=int, default=3, help="KV cache, GiB (default 3)")
    parser.add_argument("--max-batched-tokens", type=int, default=2048, help="tokens in a step")


if __name__ == "__main__":
    run_main(main)
