"""gpu-check without a GPU: the kernels' checks through the interpreter, the workload, and how failures end."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("triton")

from benchmarks.gpu.engine_bench import nano_workload
from benchmarks.gpu.records import Record, Report, check
from benchmarks.gpu.stage_process import run_stage


def test_kernels_on_a_cpu(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.gpu_check", "--device", "cpu", "--only", "kernels", "parity"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "--results", str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
        env=environment,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = tmp_path.iterdir()
    described, *records = map(json.loads, path.read_text().splitlines())
    assert described["device"] == "cpu"
    assert {record["check"] for record in records} >= {"attention", "linear", "sample", "sample filtered"}
    assert all(record["passed"] for record in records)
    assert done.stdout.count("ok ") == len(records)


def test_no_device_is_said_at_once() -> None:
    """Where there is none; nothing is checked then."""
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "benchmarks.gpu_check"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, env=environment)
    assert (done.returncode, done.stdout) == (2, "")
    assert "no CUDA device" in done.stderr


def test_the_workload_is_nano_vllms() -> None:
    """The totals that its authors publish."""
    workload = nano_workload()
    assert len(workload) == 256
    assert sum(len(prompt) for prompt, _ in workload) == 142_827
    assert sum(count for _, count in workload) == 133_966


def test_a_failing_stage_fails_the_report_and_no_other(tmp_path: Path) -> None:
    def breaks() -> Iterator[Record]:
        yield check("first", True)
        raise RuntimeError("out of something\nand more")

    report = Report(tmp_path / "report.jsonl")
    report.run("breaks", breaks)
    report.run("works", lambda: iter([check("second", True)]))
    assert not report.passed
    records = [json.loads(line) for line in report.path.read_text().splitlines()]
    assert [(record["check"], record["passed"]) for record in records] == [
        ("first", True),
        ("breaks", False),
        ("second", True),
    ]
    assert records[1]["error"] == "RuntimeError: out of something"


def test_a_stage_that_hangs_or_dies_ends_alone(tmp_path: Path) -> None:
    """What it had written down stays, and it is over when its time is."""
    report = Report(tmp_path / "report.jsonl")
    report.add(check("before", True))
    write = f'import os, time; open({str(report.path)!r}, \'a\').write(\'{{"check": "found", "passed": true}}\\n\');'
    run_stage("dies", [sys.executable, "-c", f"{write} os._exit(7)"], 60.0, report)
    run_stage("hangs", [sys.executable, "-c", "import time; time.sleep(600)"], 0.5, report)
    run_stage("works", [sys.executable, "-c", write], 60.0, report)
    records = [json.loads(line) for line in report.path.read_text().splitlines()]
    assert records == report.records
    assert [(record["check"], record["passed"]) for record in records] == [
        ("before", True),
        ("found", True),
        ("dies", False),
        ("hangs", False),
        ("found", True),
    ]
    assert not report.passed


def test_kernels_need_torch_and_triton_only() -> None:
    """A bare machine with a GPU has nothing of the services."""
    program = (
        "import sys;"
        "sys.modules |= dict.fromkeys(['baton', 'baton_protos', 'google', 'grpc', 'rich', 'zmq', 'pydantic']);"
        "import benchmarks.gpu_check, benchmarks.gpu.kernel_checks, benchmarks.gpu.kernel_bench, benchmarks.gpu.parity"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
