"""A slice of every benchmark: it runs, checks what it got, and prints figures that parse."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

_LIMIT_SECONDS = 120
_TINY = ["--shapes", "qwen3-tiny", "--runs", "1", "--threads", "1"]

Figures = list[dict[str, Any]]


def _run(name: str, *arguments: str) -> Figures:
    command = [sys.executable, "-m", f"benchmarks.{name}", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=_LIMIT_SECONDS, check=False)
    assert done.returncode == 0, done.stderr
    environment, *figures = map(json.loads, done.stdout.splitlines())
    assert environment["bench"] == "environment"
    assert {"commit", "cpu", "python"} <= environment.keys()
    return figures


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


def test_core() -> None:
    figures = _run("bench_core", "--running", "8", "--steps", "16", "--repeats", "1")
    assert [figure["bench"] for figure in figures] == ["core", "wire"]
    assert all(figure["us_per_step"] > 0 for figure in figures)


def test_cluster() -> None:
    flags = ["--executors", "2", "--rows", "4", "--step-ms", "5", "--seconds", "0.5", "--settle", "0.2"]
    (figure,) = _run("bench_cluster", *flags)
    assert figure["executors"] == 2
    assert figure["tokens_per_s"] > 0


def test_serve(models: Path) -> None:
    figures = _run("bench_serve", *_TINY, "--models", str(models), "--kv-gib", "1", "--workloads", "W1-16", "W4w")
    assert [(figure["workload"], figure["call"]) for figure in figures] == [
        ("W1-16", "stream"),
        ("W1-16", "generate"),
        ("W4w", "stream"),
        ("W4w", "generate"),
    ]
    assert [figure["out_tokens"] for figure in figures] == [1158, 1158, 512, 512]
    assert figures[2]["prefix_hit_tokens"] == 31 * 512
    assert "itl_p99_ms" in figures[0]
    assert "itl_p99_ms" not in figures[1]


def test_peers(models: Path) -> None:
    flags = ["--models", str(models), "--kv-gib", "1", "--peers-dir", str(models / "none"), "--workloads", "W3"]
    figures = _run("bench_peers", *_TINY, *flags, "--peers", "transformers-generate", "vllm")
    absent, *measured, floor = figures
    assert absent["peer"] == "vllm"
    assert "not installed" in absent["failed"]
    assert [figure["peer"] for figure in measured] == ["baton", "transformers-generate"]
    assert measured[0]["times_baton"] == 1
    assert measured[0]["floor_share"] > 0
    assert (floor["bench"], floor["workload"]) == ("floor", "W3")
    assert floor["wall_s"] == pytest.approx(floor["products_s"] + floor["attention_flops_s"], abs=2e-4)


def test_split(models: Path) -> None:
    flags = ["--models", str(models), "--requests", "4", "--shadow-requests", "4", "--round-trips", "1"]
    figures = _run("bench_split", *_TINY, *flags, "--step-ms", "1")
    assert [(figure["executor"], figure["side"]) for figure in figures] == [
        ("shadow 1 ms", "loopback"),
        ("shadow 1 ms", "1 ms"),
        ("qwen3-tiny", "in-process"),
        ("qwen3-tiny", "loopback"),
        ("qwen3-tiny", "1 ms"),
    ]
    assert all(figure["out_tok_s"] > 0 for figure in figures)
    assert {"starved_share", "run_ahead", "steps"} <= figures[-1].keys()


def test_sampler() -> None:
    figures = _run("bench_sampler", "--rows", "4", "--vocab-size", "2000", "--repeats", "1", "--composed")
    features = [figure["feature"] for figure in figures]
    assert len(set(features)) == len(features)
    assert {"greedy", "top-p", "everything"} <= set(features)
    assert all(figure["ms_per_step"] > 0 for figure in figures)
    assert {figure["feature"] for figure in figures if "composed_ms" in figure} == {"greedy", "top-p", "everything"}


def test_stream() -> None:
    flags = ["--api-processes", "1", "--streams", "8", "--connections", "2", "--seconds", "0.5", "--runs", "1"]
    figures = _run("bench_stream", *flags)
    assert [figure["text"] for figure in figures] == [False, True]
    assert all(figure["tokens_per_s"] > 0 for figure in figures)
