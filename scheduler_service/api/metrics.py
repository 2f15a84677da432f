"""What an api process measures of each request."""

import asyncio
import os
import time
from pathlib import Path
from types import TracebackType

import grpc
from prometheus_client import Counter, Histogram, values

from scheduler_service.api.errors import RequestError
from scheduler_service.api.holds import HoldEnd
from scheduler_service.api.messages import Finish, Outcome

_CANCELLED, _INVALID, _OVERLOADED, _UNAVAILABLE, _ERROR = "cancelled", "invalid", "overloaded", "unavailable", "error"
_COMPLETE = (Outcome.STOP.value, Outcome.LENGTH.value)
_CUT_SHORT = (Outcome.ABORT.value, Outcome.DEADLINE.value, _CANCELLED)
_OUTCOMES = (*_COMPLETE, *_CUT_SHORT, _INVALID, _OVERLOADED, _UNAVAILABLE, _ERROR)
_OUTCOME_OF_STATUS = {
    grpc.StatusCode.RESOURCE_EXHAUSTED: _OVERLOADED,
    grpc.StatusCode.UNAVAILABLE: _UNAVAILABLE,
    grpc.StatusCode.INTERNAL: _ERROR,
}  # every other one is the request's fault

_FIRST_TOKEN_BUCKETS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 60.0)
_INTER_TOKEN_BUCKETS = (0.001, 0.002, 0.005, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
_REFUSAL_BUCKETS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.5)
_REQUEST_BUCKETS = (0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 30.0, 60.0, 120.0, 300.0, 600.0)


def share_metrics(directory: Path, index: int) -> None:
    """Keep this process's metrics in files of ``directory``, where the launcher reads them; before any metric is made.

    The files are named by the process's index, not by its pid as is the library's default: a process that is started
    again counts on, and there are never more files than api processes.
    """
    os.environ["PROMETHEUS_MULTIPROC_DIR"] = str(directory)
    values.ValueClass = values.MultiProcessValue(lambda: index)  # type: ignore[no-untyped-call]


class RequestMetrics:
    """The metrics of all requests of this process. Counters and histograms only: those add up over processes."""

    def __init__(self) -> None:
        requests = Counter(
            "baton_requests",
            "Requests that have ended, by how: stop, length, abort (by name), deadline, cancelled (the caller left), "
            "invalid, overloaded, unavailable, error.",
            ("outcome",),
            registry=None,
        )
        self.outcomes = {outcome: requests.labels(outcome) for outcome in _OUTCOMES}
        self.prompt_tokens = Counter(
            "baton_prompt_tokens", "Prompt tokens of requests handed to the engine.", registry=None
        )
        self.generated_tokens = Counter(
            "baton_generated_tokens", "Generated tokens on their way to callers.", registry=None
        )
        holds = Counter(
            "baton_request_holds",
            "Requests whose caller lost its connection and that waited for it, by how that ended: resumed, expired, "
            "displaced (the tenant had too many), dropped.",
            ("outcome",),
            registry=None,
        )
        self.holds = {how: holds.labels(how.value) for how in HoldEnd}
        self.first_token = Histogram(
            "baton_time_to_first_token_seconds",
            "From a request's arrival to its first token in the api process.",
            registry=None,
            buckets=_FIRST_TOKEN_BUCKETS,
        )
        self.inter_token = Histogram(
            "baton_inter_token_seconds",
            "Time between tokens of one sample. One observation per message to the caller: the mean over its tokens, "
            "so one per token where the caller keeps up, and one per sample where it does not stream.",
            registry=None,
            buckets=_INTER_TOKEN_BUCKETS,
        )
        self.request = Histogram(
            "baton_request_seconds",
            "From a request's arrival to its end, of those that ended with stop or length.",
            registry=None,
            buckets=_REQUEST_BUCKETS,
        )
        self.refusal = Histogram(
            "baton_refusal_seconds",
            "From a request's arrival to its refusal, of those that were one too many.",
            registry=None,
            buckets=_REFUSAL_BUCKETS,
        )

    def hold_ended(self, how: HoldEnd) -> None:
        """A request no longer waits for its caller to come back."""
        self.holds[how].inc()

    def watch(self) -> "RequestWatch":
        """A context around the whole life of one request that arrives now."""
        return RequestWatch(self)


class RequestWatch:
    """Measures one request, from entering to leaving the context."""

    __slots__ = ("_arrived_at", "_last_at", "_metrics", "_outcome")

    def __init__(self, metrics: RequestMetrics) -> None:
        self._metrics = metrics
        self._arrived_at = time.monotonic()
        self._last_at: dict[int, float] = {}  # when tokens of a sample were last taken
        self._outcome = ""

    def submitted(self, num_prompt_tokens: int) -> None:
        """The engine has the request."""
        self._metrics.prompt_tokens.inc(num_prompt_tokens)

    def took(self, sample: int, num_tokens: int, first_token_at: float) -> None:
        """Tokens of a sample were taken for the caller.

        Args:
            sample: which.
            num_tokens: how many.
            first_token_at: when the sample's very first token came.
        """
        metrics, now = self._metrics, time.monotonic()
        metrics.generated_tokens.inc(num_tokens)
        gaps, since = num_tokens, self._last_at.get(sample)
        if since is None:
            if not self._last_at:
                metrics.first_token.observe(first_token_at - self._arrived_at)
            gaps, since = num_tokens - 1, first_token_at
        if gaps:
            metrics.inter_token.observe((now - since) / gaps)
        self._last_at[sample] = now

    def finished(self, finish: Finish) -> None:
        """The engine has ended the request; what becomes of the caller afterwards does not change that."""
        self._outcome = finish.outcome.value

    def __enter__(self) -> "RequestWatch":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        outcome = self._outcome or outcome_of(error)
        self._metrics.outcomes[outcome].inc()
        if outcome in _COMPLETE:
            self._metrics.request.observe(time.monotonic() - self._arrived_at)
        elif outcome == _OVERLOADED:
            self._metrics.refusal.observe(time.monotonic() - self._arrived_at)


def outcome_of(error: BaseException | None) -> str:
    """How a request ended that the engine did not end, in the words of ``baton_requests``."""
    if isinstance(error, RequestError):
        return _OUTCOME_OF_STATUS.get(error.status, _INVALID)
    if error is None or isinstance(error, asyncio.CancelledError | GeneratorExit | ConnectionError):
        return _CANCELLED
    return _ERROR
