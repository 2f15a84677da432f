"""What is known of a request once it has ended, for those who want it whole: traces, and the log of requests."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol, Self

from scheduler_service.api.errors import RequestError
from scheduler_service.api.messages import Finish
from scheduler_service.api.metrics import RequestMetrics, RequestWatch, outcome_of

STALL_SECONDS = 0.5
_MAX_STALLS = 32  # of one request; later ones are not kept


class Watch(Protocol):
    """Follows one request of this process, from entering to leaving the context."""

    def submitted(self, num_prompt_tokens: int) -> None:
        """The engine has the request."""

    def took(self, sample: int, num_tokens: int, first_token_at: float) -> None:
        """``num_tokens`` of a sample were taken for the caller; its very first came at ``first_token_at``."""

    def finished(self, finish: Finish) -> None:
        """The engine has ended the request, or one of its samples."""

    def __enter__(self) -> Self: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None: ...


@dataclass(frozen=True, slots=True)
class RequestRecord:
    """A request that has ended. Moments are seconds of the monotonic clock; None = it did not come to that.

    Neither prompt nor output is in it, nor any message that might quote them.

    Attributes:
        outcome: as in the metric ``baton_requests``.
        status: gRPC status of a request that failed; empty otherwise.
        field: of the request message, where one is to blame.
        arrived_at, submitted_at, started_at, first_token_at, last_token_at, ended_at: received; handed to the engine;
            part of a step plan for the first time; tokens taken for the caller; over.
        stalls: when tokens failed to come for ``STALL_SECONDS`` or longer, as (from, to).
    """

    request_id: str
    outcome: str
    status: str
    field: str
    arrived_at: float
    submitted_at: float | None
    started_at: float | None
    first_token_at: float | None
    last_token_at: float | None
    ended_at: float
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    executor_losses: int
    stalls: tuple[tuple[float, float], ...]


Sink = Callable[[RequestRecord], None]


class RequestRecorder:
    """Follows all requests of this process.

    Args:
        metrics: are told of every request.
        sinks: get the record of each request that has ended, in the task that served it. Without any, nothing is
            recorded.
    """

    def __init__(self, metrics: RequestMetrics, sinks: Sequence[Sink]) -> None:
        self._metrics = metrics
        self._sinks = sinks

    def watch(self, request_id: str) -> Watch:
        """A context around the whole life of one request that arrives now."""
        watch = self._metrics.watch()
        return _RecordingWatch(watch, request_id, self._sinks) if self._sinks else watch


class _RecordingWatch:
    """Passes everything on to the metrics' watch and remembers it."""

    def __init__(self, inner: RequestWatch, request_id: str, sinks: Sequence[Sink]) -> None:
        self._inner = inner
        self._request_id = request_id
        self._sinks = sinks
        self._arrived_at = time.monotonic()
        self._submitted_at: float | None = None
        self._first_token_at: float | None = None
        self._last_token_at: float | None = None
        self._prompt_tokens = self._output_tokens = 0
        self._finishes: list[Finish] = []
        self._stalls: list[tuple[float, float]] = []

    def submitted(self, num_prompt_tokens: int) -> None:
        self._inner.submitted(num_prompt_tokens)
        self._submitted_at = time.monotonic()
        self._prompt_tokens = num_prompt_tokens

    def took(self, sample: int, num_tokens: int, first_token_at: float) -> None:
        self._inner.took(sample, num_tokens, first_token_at)
        now = time.monotonic()
        if self._last_token_at is None:
            self._first_token_at = first_token_at
        elif now - self._last_token_at >= STALL_SECONDS and len(self._stalls) < _MAX_STALLS:
            self._stalls.append((self._last_token_at, now))
        self._last_token_at = now
        self._output_tokens += num_tokens

    def finished(self, finish: Finish) -> None:
        self._inner.finished(finish)
        self._finishes.append(finish)

    def __enter__(self) -> Self:
        self._inner.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._inner.__exit__(kind, error, traceback)
        record = self._record(error)
        for sink in self._sinks:
            sink(record)

    def _record(self, error: BaseException | None) -> RequestRecord:
        failure = error if isinstance(error, RequestError) else None
        queued = [finish.queue_us for finish in self._finishes if finish.queue_us]
        started_at = None
        if self._submitted_at is not None and (queued or self._first_token_at is not None):
            started_at = self._submitted_at + min(queued, default=0) / 1e6
        return RequestRecord(
            request_id=self._request_id,
            outcome=self._finishes[-1].outcome.value if self._finishes else outcome_of(error),
            status="" if failure is None else failure.status.name,
            field="" if failure is None else failure.field,
            arrived_at=self._arrived_at,
            submitted_at=self._submitted_at,
            started_at=started_at,
            first_token_at=self._first_token_at,
            last_token_at=self._last_token_at,
            ended_at=time.monotonic(),
            prompt_tokens=self._prompt_tokens,
            cached_tokens=max((finish.cached_tokens for finish in self._finishes), default=0),
            output_tokens=self._output_tokens,
            executor_losses=max((finish.executor_losses for finish in self._finishes), default=0),
            stalls=tuple(self._stalls),
        )
