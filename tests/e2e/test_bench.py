"""``baton bench`` and ``baton top`` against a real cluster."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from baton import Client, LocalCluster
from tests.e2e.harness import eventually, is_idle
from tests.e2e.terminal import Terminal

BATON = str(Path(sys.executable).with_name("baton"))
PNG = b"\x89PNG\r\n\x1a\n"
LATENCIES = ("ttft_ms", "itl_ms", "e2e_ms", "pause_ms")


def bench(*arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([BATON, "bench", *arguments], capture_output=True, text=True, timeout=120, check=False)


def check(one: dict[str, Any], requests: int, tokens: int) -> None:
    """``tokens`` are so many that no reader, however late, gets all of a stream in one message."""
    assert (one["requests"], one["errors"], one["cut_off"]) == (requests, {}, 0)
    assert one["output_tokens"] == requests * tokens
    assert one["requests_per_s"] == pytest.approx(requests / one["seconds"], rel=0.01)
    for name in LATENCIES:
        latency = one[name]
        assert 0 < latency["p50"] <= latency["p90"] <= latency["p99"] <= latency["max"]
    assert one["ttft_ms"]["mean"] < one["e2e_ms"]["mean"]


def test_an_open_loop_with_a_shared_prefix(cluster: LocalCluster, client: Client, tmp_path: Path) -> None:
    report, plot = tmp_path / "bench.json", tmp_path / "bench.png"
    done = bench(
        *("--server", cluster.address, "--rate", "20", "--num-requests", "24", "--shared-prefix", "64"),
        *("--input-tokens", "uniform:8-24", "--output-tokens", "32", "--seed", "3", "--slo", "ttft=60s,itl=60s"),
        *("--json", str(report), "--plot", str(plot)),
    )
    assert (done.returncode, done.stderr) == (0, "")
    for words in ("20 requests/s, poisson arrivals", "time to first token", "inter-token latency", "100.0% of the"):
        assert words in done.stdout
    document = json.loads(report.read_text())
    (one,) = document["runs"]
    check(one, 24, 32)
    assert 24 * (64 + 8) <= one["input_tokens"] <= 24 * (64 + 24)
    assert one["cached_tokens"] >= 24 * 64 - 16  # the warm-up has left the prefix; a last block may be computed again
    assert one["goodput"]["share"] == 1.0
    assert document["model"]["model"] == "random-f32"
    assert plot.read_bytes().startswith(PNG) and plot.stat().st_size > 20_000
    assert eventually(lambda: is_idle(client.cluster_status()), 10.0)


def test_a_sweep(cluster: LocalCluster, tmp_path: Path) -> None:
    plot = tmp_path / "sweep.png"
    arguments = ("--sweep", "concurrency:1,4", "--num-requests", "12", "--input-tokens", "16", "--output-tokens", "32")
    done = bench("--server", cluster.address, *arguments, "--json", "-", "--plot", str(plot))
    assert (done.returncode, done.stderr) == (0, "")
    runs = json.loads(done.stdout)["runs"]
    assert [one["load"] for one in runs] == [{"concurrency": 1}, {"concurrency": 4}]
    for one in runs:
        check(one, 12, 32)
    assert plot.read_bytes().startswith(PNG)


def test_a_private_cluster(checkpoint_f32: Path) -> None:
    arguments = ("--concurrency", "2", "--num-requests", "4", "--input-tokens", "8", "--output-tokens", "64")
    done = bench("--model", str(checkpoint_f32), *arguments, "--json", "-")
    assert done.returncode == 0, done.stderr
    check(json.loads(done.stdout)["runs"][0], 4, 64)


def test_progress_is_on_the_terminal(cluster: LocalCluster) -> None:
    arguments = ("--server", cluster.address, "--num-requests", "6", "--output-tokens", "8")
    with Terminal([BATON, "bench", *arguments]) as terminal:
        terminal.wait_for(r"6/6 requests, +\d+ tokens/s")
        terminal.wait_for("time to first token")
        assert terminal.finish() == 0


def test_top_shows_the_work(cluster: LocalCluster, client: Client) -> None:
    with client.stream([5, 6, 7], max_tokens=2000, ignore_eos=True) as stream:
        next(stream)
        with Terminal([BATON, "top", "--server", cluster.address, "--interval", "0.3"]) as terminal:
            terminal.wait_for(r"executor-0 .*1/256 ")
            terminal.wait_for(r"tokens/s: [1-9][\d,]*; ")
            terminal.press("q")
            assert terminal.finish() == 0
    assert eventually(lambda: is_idle(client.cluster_status()), 10.0)
