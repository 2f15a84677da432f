"""Whole clusters, through gRPC: equality with transformers, determinism, serving speed."""

import asyncio
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from baton import Client, LocalCluster
from baton.checkpoints.random_weights import SHAPES, write_random_checkpoint
from benchmarks.bench_serve import CALLS_IN_ORDER, cluster_options, run_once, summary
from benchmarks.checkpoints import cached_checkpoint
from benchmarks.gpu.records import Record, check, guarded
from benchmarks.grpc_calls import connect
from benchmarks.workloads import WARM_UP, WORKLOADS
from tests.e2e import corpus
from tests.e2e.harness import first_difference, options, run_alone, run_together
from tests.e2e.reference import Reference

_RUN_AHEADS = {"qwen3-tiny": ("1", "4"), "qwen2-tiny": ("4",), "llama3-tiny": ("4",)}  # by family
_TIE = 1e-3  # a GPU's float32 sums differ more than a CPU's
_MAX_TIES = 2


def check_equality(device: str) -> Iterator[Record]:
    """Greedy tokens of 64 concurrent requests against transformers, float32, for every model family."""
    for family in _RUN_AHEADS:
        yield from guarded("cluster equality", _compare(family, device), family=family)


def _compare(family: str, device: str) -> Iterator[Record]:
    requests = corpus.load()
    with tempfile.TemporaryDirectory() as directory:
        checkpoint = Path(directory) / family
        write_random_checkpoint(SHAPES[family], checkpoint, dtype="float32")
        vocab_size = SHAPES[family].vocab_size
        fitting = [replace(one, prompt=tuple(i % vocab_size for i in one.prompt)) for one in requests]
        reference = Reference(checkpoint)
        expected = reference.greedy(fitting, corpus.MAX_TOKENS)
        for run_ahead in _RUN_AHEADS[family]:
            settings = options(checkpoint, run_ahead=run_ahead, executor_arguments=("--device", device))
            with LocalCluster(settings) as cluster:
                completions = run_together(cluster.address, fitting, temperature=0.0)
            gaps = []
            for request, completion, tokens in zip(fitting, completions, expected, strict=True):
                if completion.token_ids != tokens:
                    position = first_difference(completion.token_ids, tokens)
                    gaps.append(reference.gap((*request.prompt, *tokens[:position])))
            yield check(
                "cluster equality",
                len(gaps) <= _MAX_TIES and all(gap < _TIE for gap in gaps),
                family=family,
                run_ahead=run_ahead,
                requests=len(requests),
                different=len(gaps),
                largest_gap=max(gaps, default=0.0),
            )


def check_determinism(device: str, exact: bool) -> Iterator[Record]:
    """Seeded bfloat16 requests alone and among 63 others. Where executors are not exact it is counted, not judged."""
    requests = corpus.load()
    with tempfile.TemporaryDirectory() as directory:
        checkpoint = Path(directory) / "model"
        write_random_checkpoint(SHAPES["qwen3-tiny"], checkpoint, dtype="bfloat16")
        arguments = ("--device", device, *(["--exact"] if exact else []))
        with LocalCluster(options(checkpoint, executor_arguments=arguments)) as cluster:
            together = run_together(cluster.address, requests, temperature=1.0)
            with Client(cluster.address) as client:
                alone = [run_alone(client, one, temperature=1.0) for one in requests[:8]]
    same = sum(a.token_ids == b.token_ids for a, b in zip(alone, together, strict=False))
    passed = same == len(alone) or not exact
    yield check("cluster determinism", passed, exact=exact, requests=len(alone), same=same)


def measure_serving(device: str, shapes: Sequence[str], models: Path, runs: int) -> Iterator[Record]:
    """W1 to W4 through gRPC."""
    for shape in shapes:
        checkpoint = cached_checkpoint(shape, models)
        settings = cluster_options(checkpoint, threads=2, kv_gib=8, max_batched_tokens=2048)
        settings = replace(settings, executor_arguments=("--device", device))
        with LocalCluster(settings) as cluster:
            yield from asyncio.run(_serve(cluster.address, shape, runs))


async def _serve(address: str, shape: str, runs: int) -> list[Record]:
    call = CALLS_IN_ORDER[0]
    records: list[Record] = []
    async with connect(address) as channel:
        await run_once(channel, call, WARM_UP, 0)
        for name in ("W1", "W2", "W3", "W4"):
            done = [await run_once(channel, call, WORKLOADS[name], number) for number in range(runs)]
            records.append({"bench": "serve", "shape": shape, "workload": name, "call": call, **summary(done)})
    return records
