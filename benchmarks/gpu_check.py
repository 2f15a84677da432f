"""Everything about a GPU in one command: equality with transformers through a whole cluster, then serving speed.

Each line of the results file is one JSON record; a table follows at the end. Exit code 1 if any check failed.
`--device cpu` runs the same checks without a GPU.
"""

import argparse
import asyncio
import datetime
import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from baton import Client, LocalCluster
from baton.checkpoints.random_weights import SHAPES, write_random_checkpoint
from benchmarks.bench_serve import CALLS_IN_ORDER, cluster_options, run_once, summary
from benchmarks.checkpoints import add_model_options, cached_checkpoint
from benchmarks.environment import environment
from benchmarks.figures import note, run_main
from benchmarks.workloads import WARM_UP, WORKLOADS
from tests.e2e import corpus
from tests.e2e.harness import first_difference, options, run_alone, run_together
from tests.e2e.reference import Reference

Record = dict[str, object]

_FAMILIES = ("qwen3-tiny", "qwen2-tiny", "llama3-tiny")
_TIE = 1e-3  # a GPU's float32 sums differ more than a CPU's
_MAX_TIES = 2


def check_equality(device: str, run_ahead: str) -> Iterator[Record]:
    """Greedy tokens of 64 concurrent requests against transformers, float32, for every model family."""
    requests = corpus.load()
    for family in _FAMILIES:
        with tempfile.TemporaryDirectory() as directory:
            checkpoint = Path(directory) / family
            write_random_checkpoint(SHAPES[family], checkpoint, dtype="float32")
            vocab_size = SHAPES[family].vocab_size
            fitting = [replace(one, prompt=tuple(i % vocab_size for i in one.prompt)) for one in requests]
            reference = Reference(checkpoint)
            expected = reference.greedy(fitting, corpus.MAX_TOKENS)
            settings = options(checkpoint, run_ahead=run_ahead, executor_arguments=("--device", device))
            with LocalCluster(settings) as cluster:
                completions = run_together(cluster.address, fitting, temperature=0.0)
        gaps = []
        for request, completion, tokens in zip(fitting, completions, expected, strict=True):
            if completion.token_ids != tokens:
                position = first_difference(completion.token_ids, tokens)
                gaps.append(reference.gap((*request.prompt, *tokens[:position])))
        yield {
            "check": "equality",
            "family": family,
            "run_ahead": run_ahead,
            "requests": len(requests),
            "different": len(gaps),
            "largest_gap": max(gaps, default=0.0),
            "passed": len(gaps) <= _MAX_TIES and all(gap < _TIE for gap in gaps),
        }


def check_determinism(device: str) -> Iterator[Record]:
    """Seeded bfloat16 requests alone and among 63 others. On CUDA this is best effort: counted, not judged."""
    requests = corpus.load()
    with tempfile.TemporaryDirectory() as directory:
        checkpoint = Path(directory) / "model"
        write_random_checkpoint(SHAPES["qwen3-tiny"], checkpoint, dtype="bfloat16")
        with LocalCluster(options(checkpoint, executor_arguments=("--device", device))) as cluster:
            together = run_together(cluster.address, requests, temperature=1.0)
            with Client(cluster.address) as client:
                alone = [run_alone(client, one, temperature=1.0) for one in requests[:8]]
    same = sum(a.token_ids == b.token_ids for a, b in zip(alone, together, strict=False))
    yield {
        "check": "determinism",
        "requests": len(alone),
        "same": same,
        "passed": device != "cpu" or same == len(alone),
    }


def measure_serving(device: str, shapes: Sequence[str], models: Path, runs: int) -> Iterator[Record]:
    """W1 to W4 through gRPC."""
    for shape in shapes:
        checkpoint = cached_checkpoint(shape, models)
        settings = cluster_options(checkpoint, threads=2, kv_gib=8, max_batched_tokens=2048)
        settings = replace(settings, executor_arguments=("--device", device))
        with LocalCluster(settings) as cluster:
            yield from asyncio.run(_serve(cluster.address, shape, runs))


async def _serve(address: str, shape: str, runs: int) -> list[Record]:
    from benchmarks.grpc_calls import connect

    call = CALLS_IN_ORDER[0]
    records: list[Record] = []
    async with connect(address) as channel:
        await run_once(channel, call, WARM_UP, 0)
        for name in ("W1", "W2", "W3", "W4"):
            done = [await run_once(channel, call, WORKLOADS[name], number) for number in range(runs)]
            records.append({"bench": "serve", "shape": shape, "workload": name, "call": call, **summary(done)})
    return records


def print_table(records: Sequence[Record]) -> None:
    """What a person wants to see first."""
    for record in records:
        if "check" in record:
            state = "ok    " if record["passed"] else "FAILED"
            details = ", ".join(f"{key} {value}" for key, value in record.items() if key not in ("check", "passed"))
            print(f"{state} {record['check']:<12} {details}")
        elif record["bench"] == "serve":
            print(
                f"       {record['shape']:<12} {record['workload']:<4} {record['wall_s']:>9} s "
                f"{record['out_tok_s']:>10} tok/s out {record['total_tok_s']:>10} tok/s in all"
            )


def main() -> None:
    """Run all checks and measurements, write them down, and say how they went."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_options(parser)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--runs", type=int, default=3, help="runs per workload")
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"), help="directory for the JSON file")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        print("error: no CUDA device; --device cpu runs the same checks without one", file=sys.stderr)
        sys.exit(2)
    name = torch.cuda.get_device_name() if args.device == "cuda" else "cpu"
    date = datetime.datetime.now(tz=datetime.UTC).strftime("%Y-%m-%d")
    args.results.mkdir(parents=True, exist_ok=True)
    path = args.results / f"{date}-gpu-check-{name.replace(' ', '-').lower()}.jsonl"
    records: list[Record] = [{**environment("torch", "transformers", "numpy"), "device": name}]
    with path.open("w") as file:
        file.write(json.dumps(records[0]) + "\n")
        stages = (
            ("equality", check_equality(args.device, "1")),
            ("equality with run-ahead", check_equality(args.device, "4")),
            ("determinism", check_determinism(args.device)),
            ("serving", measure_serving(args.device, args.shapes, args.models, args.runs)),
        )
        for title, stage in stages:
            note(title)
            for record in stage:
                records.append(record)
                file.write(json.dumps(record) + "\n")
                file.flush()
    print_table(records[1:])
    print(f"written: {path}")
    sys.exit(0 if all(record.get("passed", True) for record in records) else 1)


if __name__ == "__main__":
    run_main(main)
