"""``baton bench`` against a scripted server: what it sends, counts, prints and leaves behind."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import grpc
import pytest

from tests.client.fake_server import SILENCE, FakeServer, chunk, end, failure, start
from tests.client.test_cli import BATON, run

STREAM = [start(), chunk(0, [4], "a", 0), chunk(1, [5, 6], "bc", 1), end(3)]


@pytest.fixture
def talking(server: FakeServer) -> FakeServer:
    server.stream = list(STREAM)
    server.model.max_total_tokens = 4096
    return server


def bench(server: FakeServer, *arguments: str) -> "subprocess.CompletedProcess[str]":
    return run("bench", "--server", server.address, "--warm-up", "0", *arguments)


def figures(server: FakeServer, *arguments: str) -> list[dict[str, Any]]:
    done = bench(server, "--json", "-", *arguments)
    assert (done.returncode, done.stderr) == (0, "")
    runs: list[dict[str, Any]] = json.loads(done.stdout)["runs"]
    return runs


def test_a_closed_loop(talking: FakeServer) -> None:
    (one,) = figures(talking, "--concurrency", "3", "--num-requests", "10", "--input-tokens", "20")
    assert one["load"] == {"concurrency": 3}
    assert (one["requests"], one["errors"], one["output_tokens"], one["cached_tokens"]) == (10, {}, 30, 10)
    for request in talking.requests:
        assert len(request.token_ids.ids) == 20 and max(request.token_ids.ids) < talking.model.vocab_size
        assert (request.stop.max_tokens, request.stop.ignore_eos, request.sampling.temperature) == (64, True, 0.0)
    assert len({tuple(request.token_ids.ids) for request in talking.requests}) == 10


def test_an_open_loop_sends_what_is_due(talking: FakeServer) -> None:
    talking.stream = [start(), chunk(0, [4], "a", 0), SILENCE]  # nobody ever gets an answer: nobody waits for one
    arguments = ("--rate", "40", "--arrivals", "constant", "--num-requests", "20", "--timeout", "1")
    done = bench(talking, "--json", "-", *arguments)
    assert done.returncode == 1 and done.stderr.startswith("error: no request ended well: ")
    (one,) = json.loads(done.stdout)["runs"]
    assert one["errors"] == {"DEADLINE_EXCEEDED": 20}
    assert one["seconds"] >= 19 / 40 + 1
    assert len(talking.requests) == 20


def test_a_duration_ends_a_run(talking: FakeServer) -> None:
    (one,) = figures(talking, "--rate", "50", "--arrivals", "constant", "--duration", "0.5")
    assert one["requests"] == 25


def test_warm_up_is_not_measured(talking: FakeServer) -> None:
    done = run("bench", "--server", talking.address, "--warm-up", "5", "--num-requests", "4", "--json", "-")
    assert json.loads(done.stdout)["runs"][0]["requests"] == 4
    assert len({tuple(request.token_ids.ids) for request in talking.requests}) == 9


def test_errors_are_counted_by_status(talking: FakeServer) -> None:
    talking.stream = [failure(grpc.StatusCode.RESOURCE_EXHAUSTED, "the queue is full")]
    done = bench(talking, "--num-requests", "6")
    assert "ended with RESOURCE_EXHAUSTED: 6" in done.stdout
    assert (done.returncode, done.stderr) == (1, "error: no request ended well: the queue is full\n")


def test_failures_are_not_retried(talking: FakeServer) -> None:
    talking.refusals = 3
    (one,) = figures(talking, "--concurrency", "1", "--num-requests", "5")
    assert (one["requests"], one["errors"], len(talking.requests)) == (2, {"UNAVAILABLE": 3}, 5)


def test_a_lost_token_is_an_error(talking: FakeServer) -> None:
    talking.stream = [start(), chunk(0, [4], "a", 0), chunk(2, [6], "c", 1), end(3)]
    assert "ended with ProtocolError: 2" in bench(talking, "--num-requests", "2").stdout


def test_a_trace_is_replayed(talking: FakeServer, tmp_path: Path) -> None:
    trace = tmp_path / "trace.jsonl"
    later, sooner = {"offset": 10.2, "prompt": "later"}, {"offset": 10, "input_tokens": 5}
    trace.write_text("\n".join(json.dumps({**one, "output_tokens": 3}) for one in (later, sooner)))
    (one,) = figures(talking, "--trace", str(trace))
    assert (one["load"], one["requests"]) == ({}, 2)
    assert one["seconds"] >= 0.2
    assert [request.WhichOneof("prompt") for request in talking.requests] == ["token_ids", "text"]


def test_a_trace_without_times_needs_a_load(talking: FakeServer, tmp_path: Path) -> None:
    trace = tmp_path / "trace.jsonl"
    trace.write_text('{"input_tokens": 5, "output_tokens": 3}\n' * 4)
    assert "does not say when requests came" in bench(talking, "--trace", str(trace)).stderr
    (one,) = figures(talking, "--trace", str(trace), "--concurrency", "2")
    assert one["requests"] == 4


def test_a_sweep_and_its_picture(talking: FakeServer, tmp_path: Path) -> None:
    plot = tmp_path / "sweep.svg"
    done = bench(talking, "--sweep", "concurrency:1,2", "--num-requests", "4", "--plot", str(plot), "--slo", "ttft=5s")
    assert done.returncode == 0, done.stderr
    assert [line.split()[0] for line in done.stdout.splitlines() if line][1:4] == ["concurrency", "1", "2"]
    assert "goodput" in done.stdout and "\x1b" not in done.stdout
    assert "<svg" in plot.read_text()
    runs = figures(talking, "--sweep", "20,40", "--arrivals", "constant", "--num-requests", "4")
    assert [one["load"]["rate"] for one in runs] == [20, 40]


def test_an_unknown_kind_of_picture_is_one_line(talking: FakeServer, tmp_path: Path) -> None:
    done = bench(talking, "--num-requests", "2", "--plot", str(tmp_path / "a.nonsense"))
    assert done.returncode == 1 and done.stderr.startswith("error: --plot: ") and done.stderr.count("\n") == 1


def test_without_matplotlib_it_says_what_to_install(talking: FakeServer, tmp_path: Path) -> None:
    hidden = "import sys; sys.modules['matplotlib'] = None; from baton.cli import main; main()"
    arguments = ("bench", "--server", talking.address, "--plot", str(tmp_path / "a.png"))
    done = subprocess.run([sys.executable, "-c", hidden, *arguments], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (1, "error: --plot needs matplotlib: pip install 'baton[bench]'\n")
    assert not talking.requests


def test_ctrl_c_prints_what_was_measured(talking: FakeServer) -> None:
    arguments = ("--server", talking.address, "--warm-up", "0", "--rate", "50", "--duration", "60")
    with subprocess.Popen([BATON, "bench", *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        while len(talking.requests) < 20:
            assert process.poll() is None
            time.sleep(0.01)
        talking.stream = [start(), SILENCE]
        while len(talking.requests) < 30:
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=20)
    assert (process.returncode, err) == (130, b"")
    assert b"time to first token" in out and b"cut off by Ctrl-C: " in out
    assert talking.cancelled.wait(5)


@pytest.mark.parametrize(
    "arguments",
    [
        ("--rate", "0"),
        ("--rate", "nan"),
        ("--rate", "1", "--concurrency", "2"),
        ("--concurrency", "1", "--arrivals", "constant"),
        ("--sweep", "1,x"),
        ("--sweep", "concurrency:0"),
        ("--input-tokens", "many"),
        ("--slo", "ttft=5"),
    ],
)
def test_wrong_usage(arguments: tuple[str, ...]) -> None:
    done = run("bench", *arguments)
    assert (done.returncode, done.stdout) == (2, "")


def test_nobody_listens() -> None:
    done = run("bench", "--server", "127.0.0.1:1")
    assert done.returncode == 1 and done.stderr.startswith("error: cannot connect to 127.0.0.1:1")
