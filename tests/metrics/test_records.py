"""What is known of a request once it has ended, and the line that the log gets of it."""

import asyncio
import logging
import subprocess
import sys
import time
from pathlib import Path

import grpc
import pytest

from scheduler_service.api import records
from scheduler_service.api.errors import RequestError, invalid
from scheduler_service.api.messages import Finish, Outcome
from scheduler_service.api.metrics import RequestMetrics, RequestWatch
from scheduler_service.api.records import RequestRecord, RequestRecorder
from scheduler_service.api.request_log import log_request


class Clock:
    """Stands in for the module ``time``; the test moves it."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(records, "time", clock)
    return clock


@pytest.fixture
def kept() -> list[RequestRecord]:
    return []


@pytest.fixture
def recorder(kept: list[RequestRecord]) -> RequestRecorder:
    return RequestRecorder(RequestMetrics(), [kept.append])


def test_a_request_that_stalls(clock: Clock, recorder: RequestRecorder, kept: list[RequestRecord]) -> None:
    with recorder.watch("r") as watch:
        clock.now = 100.1
        watch.submitted(7)
        for now, tokens in ((100.5, 1), (100.9, 2), (101.5, 1), (101.6, 4)):
            clock.now = now
            watch.took(0, tokens, 100.4)
        watch.finished(Finish(Outcome.LENGTH, cached_tokens=3, queue_us=200_000, executor_losses=1))
        clock.now = 101.7
    (record,) = kept
    assert (record.request_id, record.outcome, record.status) == ("r", "length", "")
    assert (record.prompt_tokens, record.cached_tokens, record.output_tokens) == (7, 3, 8)
    moments = (record.arrived_at, record.submitted_at, record.started_at, record.first_token_at)
    assert moments == pytest.approx((100.0, 100.1, 100.3, 100.4))
    assert (record.last_token_at, record.ended_at) == (101.6, 101.7)
    assert record.stalls == ((100.9, 101.5),)  # 0.6 s; 0.4 s are none
    assert record.executor_losses == 1


def test_a_request_that_never_got_far(recorder: RequestRecorder, kept: list[RequestRecord]) -> None:
    with pytest.raises(RequestError), recorder.watch("r"):
        raise invalid("max_tokens", "quotes the request")
    (record,) = kept
    assert (record.outcome, record.status, record.field) == ("invalid", "INVALID_ARGUMENT", "max_tokens")
    assert record.submitted_at is record.started_at is record.first_token_at is None
    assert "quotes the request" not in repr(record)


def test_a_request_that_waited_in_vain(recorder: RequestRecorder, kept: list[RequestRecord]) -> None:
    with pytest.raises(asyncio.CancelledError), recorder.watch("r") as watch:
        watch.submitted(7)
        raise asyncio.CancelledError
    (record,) = kept
    assert (record.outcome, record.started_at) == ("cancelled", None)
    assert record.submitted_at is not None


def test_stalls_are_bounded(clock: Clock, recorder: RequestRecorder, kept: list[RequestRecord]) -> None:
    with recorder.watch("r") as watch:
        for _ in range(1000):
            clock.now += 1.0
            watch.took(0, 1, clock.now)
    assert len(kept[0].stalls) == 32


def test_metrics_count_the_same_with_and_without_records(recorder: RequestRecorder) -> None:
    counts = []
    for sinks in ([], [lambda _: None]):
        metrics = RequestMetrics()
        with RequestRecorder(metrics, sinks).watch("r") as watch:
            watch.submitted(7)
            watch.took(0, 2, time.monotonic())
            watch.finished(Finish(Outcome.STOP))
        collected = [metrics.prompt_tokens, metrics.generated_tokens, metrics.outcomes["stop"], metrics.request]
        counts.append([family.samples[0].value for metric in collected for family in metric.collect()])
    assert counts[0] == counts[1] and counts[0][:3] == [7, 2, 1]


def test_without_sinks_nothing_is_recorded() -> None:
    assert type(RequestRecorder(RequestMetrics(), []).watch("r")) is RequestWatch


def test_the_line_of_a_request(clock: Clock, recorder: RequestRecorder, kept: list[RequestRecord]) -> None:
    with pytest.raises(RequestError), recorder.watch("r") as watch:
        clock.now = 100.002
        watch.submitted(7)
        clock.now = 100.5
        raise RequestError(grpc.StatusCode.UNAVAILABLE, "", "no executor")
    logger, lines = logging.getLogger("baton.requests"), []
    handler = logging.Handler()
    handler.emit = lines.append  # type: ignore[method-assign]
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        log_request(kept[0])
    finally:
        logger.removeHandler(handler)
        logger.setLevel(logging.NOTSET)
    (line,) = lines
    expected = {
        "request_id": "r",
        "outcome": "unavailable",
        "status": "UNAVAILABLE",
        "prompt_tokens": 7,
        "cached_tokens": 0,
        "output_tokens": 0,
        "total_ms": 500.0,
        "stalls": 0,
        "executor_losses": 0,
    }
    assert expected.items() <= vars(line).items()
    assert not {"field", "queue_ms", "ttft_ms"} & vars(line).keys()


def test_tracing_is_loaded_only_where_it_is_on() -> None:
    check = "import sys, scheduler_service.api.server; sys.exit('opentelemetry' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], check=False, timeout=60).returncode == 0


def test_tracing_that_is_not_installed_is_one_line(tmp_path: Path) -> None:
    run = "runpy.run_module('scheduler_service', run_name='__main__')"
    hidden = f"import runpy, sys; sys.modules['opentelemetry'] = None; {run}"
    command = [sys.executable, "-c", hidden, "--tracing", "--model", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: --tracing needs OpenTelemetry: pip install 'baton[tracing]'\n"
