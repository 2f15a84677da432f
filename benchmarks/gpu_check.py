"""Everything about a GPU in one command: kernels, graphs, exactness, equality with transformers, speed.

Each line of the results file is one JSON record; a table follows at the end. Exit code 1 if any check failed.
Each stage is a process with a time limit; one that hangs, dies or loses the device ends alone.
`--device cpu` runs what a CPU can: kernels in Triton's interpreter, on tiny sizes, and no measurements.

A bare machine needs torch, triton and numpy for kernels, parity and kernel-speed; for graphs, exact, decode-speed and
nano also grpcio, protobuf 6, googleapis-common-protos, rich, typer and safetensors; transformers for the stage of that
name; and for cluster, which is skipped without them, what the extras scheduler and executor name.
"""

import argparse
import datetime
import importlib.util
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch

from benchmarks.environment import environment
from benchmarks.gpu.records import Record, Report, check, note
from benchmarks.gpu.stage_process import run_stage

_ROOT = Path(__file__).resolve().parents[1]
_SHAPES = ("qwen3-0.6b", "qwen3-8b")
_SERVICE_MODULES = (
    *("grpc_health", "grpc_reflection", "grpc_status", "jinja2", "llguidance", "prometheus_client"),
    *("pydantic_settings", "pythonjsonlogger", "tokenizers", "typer", "zmq"),
)
_LEAST_SECONDS = 10.0  # a stage with less time is not begun; also what ending one may take
# At most; about half of it is kernels being compiled, each once per machine.
_SECONDS = {
    "kernels": 150.0,
    "parity": 90.0,
    "graphs": 80.0,
    "exact": 60.0,
    "transformers": 60.0,
    "kernel-speed": 80.0,
    "decode-speed": 120.0,
    "nano": 60.0,
    "cluster": 240.0,
}

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
    """Captured steps against eager ones; launches, and the memory of the largest steps."""
    from benchmarks.gpu.model_checks import check_graphs, check_launches

    yield from check_graphs(device)
    yield from check_launches(device)


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
    missing = [module for module in _SERVICE_MODULES if importlib.util.find_spec(module) is None]
    if missing:  # a bare machine with a GPU may lack what the services need
        yield {"bench": "cluster", "skipped": f"needs {', '.join(missing)}"}
        return
    from benchmarks.gpu.cluster_checks import check_determinism, check_equality, measure_serving

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
    parser.add_argument("--shapes", nargs="*", default=list(_SHAPES), metavar="SHAPE", help="models to measure")
    default = Path("~/.cache/baton/models").expanduser()
    parser.add_argument("--models", type=Path, default=default, help=f"where checkpoints are kept (default {default})")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument(
        "--only", nargs="*", choices=_STAGES, default=list(_STAGES), metavar="STAGE", help="of %(choices)s"
    )
    parser.add_argument("--minutes", type=float, default=9.0, help="stages that do not fit into it are failed checks")
    parser.add_argument("--runs", type=int, default=3, help="runs per workload of the cluster")
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"), help="directory for the JSON file")
    parser.add_argument("--append", type=Path, help="run the stages in this process, and append to this file")
    args = parser.parse_args()
    if args.append is not None:
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # a stage ends what it has started
        report = Report(args.append)
        for title in args.only:
            report.run(title, partial(_STAGES[title], args, torch.device(args.device)))
        return
    began = time.monotonic()
    if args.device == "cuda" and not torch.cuda.is_available():
        note("error: no CUDA device; --device cpu runs the checks that need none")
        sys.exit(2)
    if args.device == "cpu":  # triton decides when it is imported
        os.environ |= {"TRITON_INTERPRET": "1", "BATON_KERNELS": "triton"}
    # a bare machine with a GPU has this tree, and nothing of it is installed there
    paths = [str(_ROOT), str(_ROOT / "client"), str(_ROOT / "protos"), *filter(None, [os.environ.get("PYTHONPATH")])]
    os.environ["PYTHONPATH"] = os.pathsep.join(paths)
    name = torch.cuda.get_device_name() if args.device == "cuda" else "cpu"
    moment = datetime.datetime.now(tz=datetime.UTC).strftime("%Y-%m-%d-%H%M%S")
    args.results.mkdir(parents=True, exist_ok=True)
    report = Report(args.results / f"{moment}-gpu-check-{name.replace(' ', '-').lower()}.jsonl")
    report.add({**environment("torch", "triton", "numpy"), "device": name})
    for title in args.only:
        left = began + 60 * args.minutes - time.monotonic()
        if left < _LEAST_SECONDS:
            report.add(check(title, False, error="no time left"))
            continue
        options = ["--device", args.device, "--models", str(args.models), "--runs", str(args.runs)]
        command = [sys.executable, "-m", "benchmarks.gpu_check", "--append", str(report.path), *options]
        limit = left - _LEAST_SECONDS
        if args.device == "cuda":  # in an interpreter a stage takes what it takes
            limit = min(_SECONDS[title], limit)
        run_stage(title, [*command, "--only", title, "--shapes", *args.shapes], limit, report)
    report.print_table()
    print(f"written: {report.path}")
    sys.exit(0 if report.passed else 1)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        note("interrupted")
        sys.exit(130)
