"""Everything about a GPU in one command: kernels, graphs, exactness, equality with transformers, speed.

Each line of the results file is one JSON record; tables follow at the end. Exit code 1 if any check failed, and a stage
that could not be run is a failed check. Each stage is a process with a time limit; one that hangs, dies or loses the
device ends alone. Stages that measure run one after another, with nothing beside them.
`--device cpu` runs what a CPU can, kernels in Triton's interpreter, on tiny sizes; its figures mean nothing.
"""

import argparse
import datetime
import importlib.util
import os
import re
import signal
import sys
import tempfile
import time
from functools import cache, partial
from pathlib import Path

import torch

from benchmarks.environment import environment
from benchmarks.gpu.records import Report, note
from benchmarks.gpu.stage_process import StageCommand, run_stages
from benchmarks.gpu.stages import STAGES, StageInputs
from benchmarks.gpu.tables import tables
from benchmarks.machine import usable_cores

_ROOT = Path(__file__).resolve().parents[1]
_SHAPES = ("qwen3-0.6b", "qwen3-8b")
_PACKAGES = ("torch", "triton", "numpy", "transformers")
_AT_ONCE = 6
_CORES_PER_STAGE = 2  # of stages that measure nothing: they compile most of the time


def main() -> None:
    """Run all checks and measurements, write them down, and say how they went."""
    args = _arguments()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # whoever is stopped stops what he has started
    if args.append is not None:
        report = Report(args.append)
        inputs = StageInputs(torch.device(args.device), tuple(args.shapes), args.models, args.runs)
        for title in args.only:
            report.run(title, partial(STAGES[title].work, inputs))
        return
    deadline = time.monotonic() + 60 * args.minutes
    if args.device == "cuda" and not torch.cuda.is_available():
        note("error: no CUDA device; --device cpu runs the checks that need none")
        sys.exit(2)
    _prepare_environment(args.device)
    models = args.models or _cache_directory() / "models"
    report = _begin_report(args.results, args.device, args.commit)
    passed = False
    try:
        commands = [_command(title, args, models, report) for title in args.only]
        at_once = max(1, min(_AT_ONCE, usable_cores() // _CORES_PER_STAGE))
        run_stages([command for command in commands if not STAGES[command.title].alone], at_once, deadline, report)
        run_stages([command for command in commands if STAGES[command.title].alone], 1, deadline, report)
        report.reload()
        passed = report.passed
    finally:  # whoever interrupts this sees what there is
        report.reload()
        print(*tables(report.records, list(STAGES)), sep="\n")
        print(f"{'passed' if passed else 'FAILED'}; written: {report.path}", flush=True)
    sys.exit(0 if passed else 1)


def _command(title: str, args: argparse.Namespace, models: Path, report: Report) -> StageCommand:
    command = [
        *(sys.executable, "-m", "benchmarks.gpu_check", "--append", str(report.path), "--only", title),
        *("--device", args.device, "--models", str(models), "--runs", str(args.runs), "--shapes", *args.shapes),
    ]
    # an interpreter takes what it takes
    return StageCommand(title, command, STAGES[title].seconds if args.device == "cuda" else float("inf"))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=list(_SHAPES), metavar="SHAPE", help="models to measure")
    parser.add_argument("--models", type=Path, help="where checkpoints are kept (default: ~/.cache/baton/models)")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument(
        "--only", nargs="+", choices=STAGES, default=list(STAGES), metavar="STAGE", help="of %(choices)s"
    )
    parser.add_argument("--minutes", type=float, default=8.5, help="stages that do not fit into it are failed checks")
    parser.add_argument("--runs", type=int, default=3, help="runs per workload that is served")
    parser.add_argument(
        "--results", type=Path, default=_ROOT / "benchmarks/results", help="directory for the JSON file (%(default)s)"
    )
    parser.add_argument("--commit", default="", help="of this tree, where it has come without git")
    parser.add_argument("--append", type=Path, help="run the stages in this process, and append to this file")
    return parser.parse_args()


def _prepare_environment(device: str) -> None:
    """What stages find: this tree, though nothing of it may be installed; a place for compiled kernels; no network."""
    if device == "cpu":  # triton decides when it is imported
        os.environ |= {"TRITON_INTERPRET": "1", "BATON_KERNELS": "triton", "CUDA_VISIBLE_DEVICES": ""}
    paths = [str(_ROOT), str(_ROOT / "client"), str(_ROOT / "protos"), *filter(None, [os.environ.get("PYTHONPATH")])]
    os.environ["PYTHONPATH"] = os.pathsep.join(paths)
    os.environ.setdefault("TRITON_CACHE_DIR", str(_cache_directory() / "triton"))
    os.environ.setdefault("HF_HUB_OFFLINE", "1")


@cache
def _cache_directory() -> Path:
    """The user's; where that cannot be written, a new one."""
    directory = Path("~/.cache/baton").expanduser()
    try:
        directory.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=directory).close()
    except OSError:
        return Path(tempfile.mkdtemp(prefix="baton-"))
    return directory


def _begin_report(directory: Path, device: str, commit: str) -> Report:
    """A dated file that says what the records after it are about."""
    described: dict[str, object] = {"device": device}
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        described = {
            "device": properties.name,
            "device_gib": round(properties.total_memory / (1 << 30), 1),
            "multiprocessors": properties.multi_processor_count,
            "l2_mib": properties.L2_cache_size / (1 << 20),
            "cuda": torch.version.cuda,
        }
    moment = datetime.datetime.now(tz=datetime.UTC).strftime("%Y-%m-%d-%H%M%S")
    name = re.sub(r"[^a-z0-9]+", "-", str(described["device"]).lower())
    directory.mkdir(parents=True, exist_ok=True)
    report = Report(directory / f"{moment}-gpu-check-{name}.jsonl")
    known = environment(*(name for name in _PACKAGES if importlib.util.find_spec(name) is not None))
    report.add(known | described | ({"commit": commit} if commit else {}))
    return report


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        note("interrupted")
        sys.exit(130)
