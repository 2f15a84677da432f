"""OpenTelemetry spans of requests: one each, with its phases below it. Imported only where tracing is on.

The standard environment variables configure it: OTEL_EXPORTER_OTLP_ENDPOINT, OTEL_TRACES_SAMPLER, OTEL_SERVICE_NAME,
OTEL_PROPAGATORS, ... The exporter speaks OTLP over gRPC. Spans are made when a request has ended, from its record:
while it runs, tracing costs nothing. Names of attributes are those of the semantic conventions for generative AI where
there is one, and begin with ``baton.`` elsewhere. Neither prompts nor output are in any.
"""

import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import Any, TypeAlias

import grpc
from opentelemetry import context, propagate, trace
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.util.types import AttributeValue

from scheduler_service.api.records import RequestRecord

_SCOPE = "baton.scheduler"
_OPERATION = "text_completion"
_OUR_FAULT = ("error", "unavailable")  # as for any gRPC server: a bad or refused request is no failed span

_Details: TypeAlias = "grpc.HandlerCallDetails"
_Continuation: TypeAlias = Callable[[_Details], Awaitable["grpc.RpcMethodHandler[Any, Any]"]]


class ContextInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[misc]
    """Makes the caller's trace, if the metadata names one, the current one of the task that handles the call."""

    async def intercept_service(
        self, continuation: _Continuation, handler_call_details: _Details
    ) -> "grpc.RpcMethodHandler[Any, Any]":
        """See grpc.aio.ServerInterceptor."""
        metadata = handler_call_details.invocation_metadata or ()
        carrier = {key: value for key, value in metadata if isinstance(value, str)}
        context.attach(propagate.extract(carrier))  # never detached: the context is the task's own, and ends with it
        return await continuation(handler_call_details)


class Tracer:
    """Turns records of requests into spans and sends them to the collector, in batches, from a thread."""

    def __init__(self, model: str, instance: str) -> None:
        """Create a tracer.

        Args:
            model: the name under which the model is served.
            instance: names this process among those of all schedulers.
        """
        ours = Resource.create({"service.name": "baton-scheduler", "service.instance.id": instance})
        # shutdown_on_exit would wait for an unreachable collector.
        self._provider = TracerProvider(resource=ours.merge(OTELResourceDetector().detect()), shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
        self._tracer = self._provider.get_tracer(_SCOPE)
        self._model = model

    def trace(self, record: RequestRecord) -> None:
        """Make the spans of a request, below the caller's span if there is one and as its sampling flag says."""
        clock = _WallClock()
        span = self._tracer.start_span(
            f"{_OPERATION} {self._model}",
            kind=trace.SpanKind.SERVER,
            start_time=clock.nanoseconds(record.arrived_at),
        )
        if not span.is_recording():
            return
        span.set_attributes(_attributes(record, self._model))
        if record.outcome in _OUR_FAULT:
            span.set_status(trace.StatusCode.ERROR, record.status)
        parent = trace.set_span_in_context(span)
        for name, begin, end in _phases(record):
            self._tracer.start_span(name, parent, start_time=clock.nanoseconds(begin)).end(clock.nanoseconds(end))
        span.end(clock.nanoseconds(record.ended_at))

    def close(self, timeout: float) -> None:
        """Send what is left, for at most ``timeout`` seconds."""
        closing = threading.Thread(target=self._provider.shutdown, name="tracing", daemon=True)
        closing.start()
        closing.join(timeout)


class _WallClock:
    """Moments of the monotonic clock as nanoseconds since the Unix epoch."""

    def __init__(self) -> None:
        self._offset = time.time_ns() - round(time.monotonic() * 1e9)

    def nanoseconds(self, moment: float) -> int:
        return round(moment * 1e9) + self._offset


def _attributes(record: RequestRecord, model: str) -> dict[str, AttributeValue]:
    attributes: dict[str, AttributeValue] = {
        "gen_ai.operation.name": _OPERATION,
        "gen_ai.provider.name": "baton",
        "gen_ai.request.model": model,
        "gen_ai.response.id": record.request_id,
        "gen_ai.response.finish_reasons": [record.outcome],
        "gen_ai.usage.input_tokens": record.prompt_tokens,
        "gen_ai.usage.cache_read.input_tokens": record.cached_tokens,
        "gen_ai.usage.output_tokens": record.output_tokens,
        "baton.executor_losses": record.executor_losses,
        "baton.stalls": len(record.stalls),
    }
    if record.status:
        attributes["error.type"] = record.status
    return attributes


def _phases(record: RequestRecord) -> Iterator[tuple[str, float, float]]:
    """Name, begin and end of each phase that the request came to; the last of them lasts to the request's end."""
    bounds = (
        ("tokenize", record.arrived_at),
        ("queue", record.submitted_at),
        ("prefill", record.started_at),
        ("decode", record.first_token_at),
    )
    begun = [(name, moment) for name, moment in bounds if moment is not None]
    ends = [*(moment for _, moment in begun[1:]), record.last_token_at or record.ended_at]
    for (name, begin), end in zip(begun, ends, strict=True):
        yield name, begin, max(begin, end)
    for begin, end in record.stalls:
        yield "stall", begin, end
