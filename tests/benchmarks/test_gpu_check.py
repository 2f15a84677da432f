"""gpu-check without a GPU: the kernels' checks through the interpreter, the workload, and how failures end."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

pytest.importorskip("triton")

from benchmarks.gpu.engine_bench import nano_workload
from benchmarks.gpu.records import Record, Report, check
from benchmarks.gpu.stage_process import StageCommand, run_stages
from benchmarks.gpu.tables import tables

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def run_check(*arguments: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "benchmarks.gpu_check", *arguments]
    env = ENVIRONMENT | environment
    return subprocess.run(command, capture_output=True, text=True, timeout=180, check=False, env=env)


def test_kernels_on_a_cpu(tmp_path: Path) -> None:
    arguments = ("--device", "cpu", "--only", "kernels", "parity", "--results", str(tmp_path), "--commit", "abc")
    # newer numpys refuse what this one warns of: with them an interpreter cannot count to a number that is no constant
    done = run_check(*arguments, PYTHONWARNINGS="error:Conversion of an array with ndim:DeprecationWarning")
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = tmp_path.iterdir()
    described, *records = map(json.loads, path.read_text().splitlines())
    assert (described["device"], described["commit"]) == ("cpu", "abc")
    assert {record["check"] for record in records} >= {"attention", "linear", "sample filtered", "sample processed"}
    assert all(record["passed"] and record["stage"] == "kernels" for record in records)
    assert "  ok      linear (2): dtype float32 float16, error up to " in done.stdout


def test_no_device_is_said_at_once() -> None:
    """Where there is none; nothing is checked then."""
    done = run_check(CUDA_VISIBLE_DEVICES="")
    assert (done.returncode, done.stdout) == (2, "")
    assert "no CUDA device" in done.stderr


def test_a_home_that_cannot_be_written(tmp_path: Path) -> None:
    """Nor can the stage end well that has no time: it is a failed check."""
    done = run_check(
        *("--device", "cpu", "--only", "kernels", "--minutes", "0", "--results", str(tmp_path)), HOME="/proc/nowhere"
    )
    assert done.returncode == 1, done.stderr
    assert "  FAILED  kernels: error no time left" in done.stdout


def test_the_workload_is_nano_vllms() -> None:
    """The totals that its authors publish."""
    workload = nano_workload()
    assert len(workload) == 256
    assert sum(len(prompt) for prompt, _ in workload) == 142_827
    assert sum(count for _, count in workload) == 133_966


def test_a_failing_stage_fails_the_report_and_no_other(tmp_path: Path) -> None:
    def breaks() -> Iterator[Record]:
        yield check("first", True, error=float("inf"))
        raise RuntimeError("out of something\nand more")

    def cannot_begin() -> Iterator[Record]:
        raise ModuleNotFoundError("No module named 'transformers'")

    report = Report(tmp_path / "report.jsonl")
    report.run("breaks", breaks)
    report.run("cannot begin", cannot_begin)
    report.run("works", lambda: iter([check("second", True)]))
    assert not report.passed
    assert [json.loads(line, parse_constant=pytest.fail) for line in report.path.read_text().splitlines()] == [
        {"stage": "breaks", "check": "first", "passed": True, "error": "inf"},
        {"stage": "breaks", "check": "breaks", "passed": False, "error": "RuntimeError: out of something"},
        {
            "stage": "cannot begin",
            "check": "cannot begin",
            "passed": False,
            "error": "ModuleNotFoundError: No module named 'transformers'",
        },
        {"stage": "works", "check": "second", "passed": True},
    ]


def program(title: str, source: str, seconds: float = 60.0) -> StageCommand:
    return StageCommand(title, [sys.executable, "-c", source], seconds)


def writing(path: Path, name: str) -> str:
    """Source of a stage that finds something."""
    return f'import os, time; open({str(path)!r}, \'a\').write(\'{{"check": "{name}", "passed": true}}\\n\');'


@pytest.mark.parametrize("at_once", [1, 3])
def test_a_stage_that_hangs_or_dies_ends_alone(tmp_path: Path, at_once: int) -> None:
    """What it had written down stays, a line that it could not finish is a failure, and it ends when its time does."""
    report = Report(tmp_path / "report.jsonl")
    report.add(check("before", True))
    torn = f"open({str(report.path)!r}, 'a').write('{{\"check\": \\n'); os._exit(7)"
    stages = [
        program("hangs", "import time; time.sleep(600)", 0.5),
        program("dies", writing(report.path, "found") + torn),
        program("works", writing(report.path, "found too")),
    ]
    run_stages(stages, at_once, time.monotonic() + 300.0, report)
    report.reload()
    outcomes = {(record["check"], record["passed"]) for record in report.records}
    failed = {("hangs", False), ("results file", False), ("dies", False)}
    assert outcomes == {("before", True), ("found", True), ("found too", True)} | failed
    errors = {record["check"]: str(record["error"]) for record in report.records if not record["passed"]}
    assert errors["dies"] == "ended with code 7"
    assert re.fullmatch(r"not done after \d\.\d s", errors["hangs"])
    assert not report.passed


def test_stages_without_time_are_failed_checks(tmp_path: Path) -> None:
    report = Report(tmp_path / "report.jsonl")
    run_stages([program("late", "print('never')")], 1, time.monotonic() + 1.0, report)
    assert report.records == [{"stage": "late", "check": "late", "passed": False, "error": "no time left"}]


def test_who_is_stopped_leaves_tables_and_no_stage(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.gpu_check", "--device", "cpu", "--only", "kernels"]
    with subprocess.Popen(
        [*command, "--results", str(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
    ) as process:
        while not any(tmp_path.iterdir()):
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "FAILED; written" in out


def test_tables() -> None:
    records: list[Record] = [
        {"bench": "environment"},
        {"stage": "speed", "bench": "decode", "rows": 64, "us": 12.34567, "flash_us": None},
        {"stage": "kernels", **check("linear", True, dtype="float32", error=1e-3)},
        {"stage": "speed", "bench": "decode", "rows": 256, "us": 7.0, "flash_us": None},
        {"stage": "kernels", **check("linear", True, dtype="float16", error=2e-3)},
        {"stage": "kernels", **check("linear", False, dtype="bfloat16", error="inf")},
    ]
    assert list(tables(records, ["kernels", "graphs", "speed"])) == [
        "kernels",
        "  ok      linear (2): dtype float32 float16, error up to 0.002",
        "  FAILED  linear: dtype bfloat16, error inf",
        "speed",
        "  decode",
        "    rows     us",
        "      64  12.35",
        "     256      7",
    ]


def test_kernels_need_torch_and_triton_only() -> None:
    """A bare machine with a GPU has nothing of the services."""
    source = (
        "import sys;"
        "sys.modules |= dict.fromkeys(['baton', 'baton_protos', 'google', 'grpc', 'rich', 'zmq', 'pydantic']);"
        "import benchmarks.gpu_check, benchmarks.gpu.kernel_checks, benchmarks.gpu.kernel_bench, benchmarks.gpu.parity"
    )
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


def test_the_wheels_to_carry_are_all_that_a_bare_machine_lacks() -> None:
    """Everything that the services need, but for what comes with torch and transformers."""
    lines = (ROOT / "benchmarks/gpu/requirements.txt").read_text().splitlines()
    carried = {canonicalize_name(line) for line in lines if not line.startswith("#")}
    needed: set[str] = set()
    todo = [Requirement("baton[scheduler,executor]")]
    while todo:
        one = todo.pop()
        for requirement in map(Requirement, metadata.requires(one.name) or ()):
            name = canonicalize_name(requirement.name)
            wanted = requirement.marker is None or any(
                requirement.marker.evaluate({"extra": extra}) for extra in (*one.extras, "")
            )
            if wanted and name not in {*needed, "torch", "numpy", "safetensors", "tokenizers"}:
                needed.add(name)
                todo.append(requirement)
    assert carried == needed
