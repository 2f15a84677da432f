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
    assert {record["check"] for record in records} >= {"attention", "linear", "gumbel_noise", "mask_top_k_top_p"}
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
    report.run("breaks", breaks())
    report.run("works", iter([check("second", True)]))
    assert not report.passed
    records = [json.loads(line) for line in report.path.read_text().splitlines()]
    assert [(record["check"], record["passed"]) for record in records] == [
        ("first", True),
        ("breaks", False),
        ("second", True),
    ]
    assert records[1]["error"] == "RuntimeError: out of something"
