"""Everything about a GPU in one command: kernels, graphs, exactness, equality with transformers, speed.

Each line of the results file is one JSON record; a table follows at the end. Exit code 1 if any check failed.
`--device cpu` runs what a CPU can: kernels in Triton's interpreter, on tiny sizes, and no measurements.
"""

import argparse
import datetime
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from benchmarks.checkpoints import add_model_options
from benchmarks.environment import environment
from benchmarks.figures import note, run_main
from benchmarks.gpu.records import Record, Report

_SHAPES = ("qwen3-0.6b", "qwen3-8b")

Stage = Callable[[argparse.Namespace, torch.device], Iterator[Record]]


def kernels(args: argparse.Namespace, device: torch.device) -> Iterator[Record]:
    """Every Triton kernel against float64."""
    from benchmarks.gpu.kernel_checks import check_kernels

    return check_kernels(device)


def parity(args: argparse.Namespace, device: torch.device) -> Iterator[Record]:
    """Compiled kernels against interpreted ones."""
    from benchmarks.gpu.parity import check_parity

    return check_parity(device)


def graphs(args: argparse.Namespace, device: torch.device) -> Iterator[Record]:
    """Captured steps against eager ones."""
    from benchmarks.gpu.model_checks import check_graphs

    return check_graphs(device)


def exact(args: argparse.Namespace, device: torch.device) -> Iterator[Record]:
    """The exact mode, bit by bit."""
    from benchmarks.gpu.model_checks import check_exact, check_exact_kernels

    yield from check_exact_kernels(device)
    yield from check_exact(device)


def transformers(args: argparse.Namespace, device: torch.device) -> Iterator[Record]:
    """Greedy tokens against transformers."""
    from benchmarks.gpu.model_checks import check_transformers

    return check_transformers(device)


def kernel_speed(args: argparse.Namespace, device: torch.device) -> Iterator[Record]:
    """Each kernel against the roofline."""
    from benchmarks.gpu.kernel_bench import bench_kernels, measure_roofline

    if device.type == "cuda":
        yield from bench_kernels(measure_roofline())


def decode_speed(args: argparse.Namespace, device: torch.device) -> Iterator[Record]:
    """Decode steps of whole models against the roofline."""
    from benchmarks.gpu.engine_bench import DecodeSize, bench_decode
    from benchmarks.gpu.kernel_bench import measure_roofline

    if device.type == "cpu":
        yield from bench_decode("qwen3-tiny", device, [DecodeSize(2, 3, 1)], exact=False, bytes_per_s=None)
        return
    bandwidth = measure_roofline().bytes_per_s
    sizes = [DecodeSize(rows, 512, 64) for rows in (1, 64, 256)]
    for shape in args.shapes:
        for is_exact in (False, True):
            yield from bench_decode(shape, device, sizes, is_exact, bandwidth)


def nano(args: argparse.Namespace, device: torch.device) -> Iterator[Record]:
    """nano-vllm's workload."""
    from benchmarks.gpu.engine_bench import bench_nano

    if device.type == "cuda":
        yield from bench_nano(args.shapes[0], device, max_rows=256, max_tokens=8192, limit=None)


def cluster(args: argparse.Namespace, device: torch.device) -> Iterator[Record]:
    """A scheduler and an executor, through gRPC."""
    try:
        from benchmarks.gpu.cluster_checks import check_determinism, check_equality, measure_serving
    except ImportError as error:  # a bare machine with a GPU may lack what the services need
        yield {"bench": "cluster", "skipped": str(error)}
        return
    os.environ.pop("BATON_KERNELS", None)  # a whole cluster in an interpreter would never end
    yield from check_equality(device.type, "1")
    yield from check_equality(device.type, "4")
    yield from check_determinism(device.type)
    if device.type == "cuda":
        yield from measure_serving(device.type, args.shapes[:1], args.models, args.runs)


_STAGES: dict[str, Stage] = {
    stage.__name__.replace("_", "-"): stage
    for stage in (kernels, parity, graphs, exact, transformers, kernel_speed, decode_speed, nano, cluster)
}


def main() -> None:
    """Run all checks and measurements, write them down, and say how they went."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_options(parser, _SHAPES)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument(
        "--only", nargs="*", choices=_STAGES, default=list(_STAGES), metavar="STAGE", help="of %(choices)s"
    )
    parser.add_argument("--runs", type=int, default=3, help="runs per workload of the cluster")
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"), help="directory for the JSON file")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        note("error: no CUDA device; --device cpu runs the checks that need none")
        sys.exit(2)
    if args.device == "cpu":  # before triton is imported: it decides then
        os.environ |= {"TRITON_INTERPRET": "1", "BATON_KERNELS": "triton"}
    name = torch.cuda.get_device_name() if args.device == "cuda" else "cpu"
    moment = datetime.datetime.now(tz=datetime.UTC).strftime("%Y-%m-%d-%H%M%S")
    args.results.mkdir(parents=True, exist_ok=True)
    report = Report(args.results / f"{moment}-gpu-check-{name.replace(' ', '-').lower()}.jsonl")
    report.add({**environment("torch", "triton", "numpy"), "device": name})
    for title in args.only:
        report.run(title, _STAGES[title](args, torch.device(args.device)))
    report.print_table()
    print(f"written: {report.path}")
    sys.exit(0 if report.passed else 1)


if __name__ == "__main__":
    run_main(main)
