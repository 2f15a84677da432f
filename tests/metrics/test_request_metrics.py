"""What an api process measures of requests, without a server."""

import asyncio
import time

import grpc
import pytest
from prometheus_client import Counter, Histogram

from scheduler_service.api.errors import RequestError, invalid, overloaded, unavailable
from scheduler_service.api.messages import Finish, Outcome
from scheduler_service.api.metrics import RequestMetrics


def value(metric: Counter | Histogram, suffix: str) -> float:
    (sample,) = [s for family in metric.collect() for s in family.samples if s.name.endswith(suffix)]
    return sample.value


def count(metric: Histogram) -> float:
    return value(metric, "_count")


def test_every_message_is_one_observation_of_the_mean_gap() -> None:
    metrics = RequestMetrics()
    with metrics.watch() as watch:
        watch.submitted(7)
        arrived_at = watch._arrived_at
        watch.took(0, 1, arrived_at + 0.25)  # the first token comes after no gap
        assert (value(metrics.first_token, "_sum"), count(metrics.inter_token)) == (0.25, 0)
        watch.took(0, 1, arrived_at + 0.25)
        watch.took(0, 5, arrived_at + 0.25)
        watch.finished(Finish(Outcome.LENGTH))
    assert (count(metrics.first_token), count(metrics.inter_token), count(metrics.request)) == (1, 2, 1)
    assert value(metrics.prompt_tokens, "_total") == 7
    assert value(metrics.generated_tokens, "_total") == 7


def test_samples_have_gaps_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    metrics, moments = RequestMetrics(), [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: moments[-1])
    with metrics.watch() as watch:
        for now in (101.0, 102.0, 103.0):
            moments.append(now)
            watch.took(0, 1, 101.0)
            watch.took(1, 1, 101.0)
        watch.took(2, 3, 101.0)  # of two seconds
        watch.finished(Finish(Outcome.LENGTH))
    assert (count(metrics.inter_token), value(metrics.inter_token, "_sum")) == (5, 5.0)
    assert (count(metrics.first_token), value(metrics.first_token, "_sum")) == (1, 1.0)


def test_a_request_taken_at_once_has_a_mean_gap_too() -> None:
    metrics = RequestMetrics()
    with metrics.watch() as watch:
        watch.took(0, 11, watch._arrived_at - 10.0)  # as if its tokens had taken ten seconds
        watch.finished(Finish(Outcome.STOP))
    assert value(metrics.inter_token, "_sum") == pytest.approx(1.0, abs=0.2)


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (invalid("max_tokens", "is too large"), "invalid"),
        (RequestError(grpc.StatusCode.ALREADY_EXISTS, "request_id", "is there"), "invalid"),
        (overloaded("the queue is full"), "overloaded"),
        (unavailable("no executor"), "unavailable"),
        (RequestError(grpc.StatusCode.INTERNAL, "", "bad logits"), "error"),
        (KeyError("a defect of ours"), "error"),
        (asyncio.CancelledError(), "cancelled"),
    ],
)
def test_outcomes_of_requests_that_end_otherwise(error: BaseException, outcome: str) -> None:
    metrics = RequestMetrics()
    with pytest.raises(type(error)), metrics.watch():
        raise error
    counts = {name: value(counter, "_total") for name, counter in metrics.outcomes.items()}
    assert counts == {name: float(name == outcome) for name in counts}
    assert count(metrics.request) == 0
    assert count(metrics.refusal) == (outcome == "overloaded")


def test_a_caller_who_leaves_after_the_end_changes_nothing() -> None:
    metrics = RequestMetrics()
    with pytest.raises(asyncio.CancelledError), metrics.watch() as watch:
        watch.finished(Finish(Outcome.STOP))
        raise asyncio.CancelledError
    assert value(metrics.outcomes["stop"], "_total") == 1
    assert value(metrics.outcomes["cancelled"], "_total") == 0
