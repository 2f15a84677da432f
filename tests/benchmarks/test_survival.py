"""Slices of the survival measurements: what they find must be right; how long it took is for quiet machines to say."""

import json
import subprocess
import sys
from typing import Any

from baton.checkpoints import TINY_PYTHON
from benchmarks.kill_test.losses import LossyWay

_LIMIT_SECONDS = 150
_GREETING = bytes(64)
_COMMAND = bytes([4, 3]) + b"abc"

Figures = list[dict[str, Any]]


def _run(name: str, *arguments: str) -> tuple[int, Figures]:
    command = [sys.executable, "-m", f"benchmarks.{name}", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=_LIMIT_SECONDS, check=False)
    assert done.returncode in {0, 1} and "Traceback" not in done.stderr and "error:" not in done.stderr, done.stderr
    environment, *figures = map(json.loads, done.stdout.splitlines())
    assert environment["bench"] == "environment"
    return done.returncode, figures


def test_one_request_has_one_output() -> None:
    code, (cluster, total) = _run("determinism", "--runs", "30", "--kills", "1", "--clusters", "4")
    assert (cluster["runs"], cluster["outputs"], cluster["failed"]) == (30, 1, {})
    assert cluster["kills"] == 1
    assert cluster["preemptions"] > 0
    assert len(cluster["cached_tokens_of_runs"]) > 1
    assert (total["runs"], total["outputs"], code) == (30, 1, 0)


def test_faults_are_detected_for_what_they_are() -> None:
    _, figures = _run("detection", "--repetitions", "1", "--kinds", "hang", "term")
    assert [figure["fault"] for figure in figures] == ["hang", "term"]
    assert all((figure["failed"], figure["mismatched"], figure["streams"]) == ({}, 0, 40) for figure in figures)
    assert all(figure["least_rows"] >= 16 and figure["max_s"] > 0 for figure in figures)
    reasons = [figure.get("reasons") for figure in figures]
    assert reasons == [{"a step has been running": 1}, None]


def test_overload_is_refused() -> None:
    # So much, and so little room for it, that there is too much of it on any machine, however busy.
    flags = ["--model", str(TINY_PYTHON), "--times", "20", "--rows", "8", "--queue", "8", "--concurrency", "8"]
    _, (closed, over) = _run("overload", *flags, "--seconds", "2", "--peak-seconds", "2", "--settle", "0.5")
    assert (closed["loop"], closed["failed_or_different"]) == ("closed", 0)
    assert over["different"] == 0
    assert over["taken"] > 0
    assert list(over["refused"]) == ["RESOURCE_EXHAUSTED"]
    assert over["hinted"] == over["refused"]["RESOURCE_EXHAUSTED"]
    assert over["refused_within_10_ms_at_server"] > 0


def test_long_steps_are_no_hangs() -> None:
    code, (figure,) = _run("false_alarms", "--shapes", "qwen3-tiny", "--minutes", "0.05", "--threads", "1")
    assert (code, figure["failed"]) == (0, {})
    assert figure["prompts"] > 0
    assert sum(figure["executor_losses"].values()) == 0
    assert "stuck" in figure["executor_losses"]


def test_messages_are_lost_whole_and_nothing_else_is() -> None:
    messages = [bytes([0, 2, number, number]) for number in range(200)]
    messages.append(bytes([2]) + (300).to_bytes(8, "big") + bytes(300))
    sent = _GREETING + _COMMAND + b"".join(messages)
    way = LossyWay(0.25, seed=1)
    came = b"".join(way.take(sent[at : at + 7]) for at in range(0, len(sent), 7))
    assert came.startswith(_GREETING + _COMMAND)
    rest, kept = came[len(_GREETING + _COMMAND) :], 0
    for message in messages:
        if rest.startswith(message):
            rest, kept = rest[len(message) :], kept + 1
    assert rest == b""
    assert 120 < kept < 180
    lossless = LossyWay(0.0, seed=1)
    assert b"".join(lossless.take(sent[at : at + 5]) for at in range(0, len(sent), 5)) == sent
