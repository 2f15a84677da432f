"""An OpenTelemetry collector in this process: takes traces over gRPC and keeps their spans."""

import threading
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Any, Self

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as pb
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2_grpc as pb_grpc
from opentelemetry.proto.trace.v1.trace_pb2 import Span


def attributes(span: Span) -> dict[str, Any]:
    """A span's attributes as plain values."""
    found: dict[str, Any] = {}
    for item in span.attributes:
        kind = item.value.WhichOneof("value")
        value = getattr(item.value, kind)
        found[item.key] = [one.string_value for one in value.values] if kind == "array_value" else value
    return found


class Collector(pb_grpc.TraceServiceServicer):
    """Runs on ``with``.

    Attributes:
        received: all that came, as text: to look for what must not be in it.
        resources: attributes of the processes that sent spans.
    """

    def __init__(self) -> None:
        self.received = ""
        self.resources: list[dict[str, str]] = []
        self._spans: list[Span] = []
        self._lock = threading.Lock()
        self._server = grpc.server(ThreadPoolExecutor(2))
        pb_grpc.add_TraceServiceServicer_to_server(self, self._server)
        self.endpoint = f"http://127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"

    def Export(self, request: pb.ExportTraceServiceRequest, context: Any) -> pb.ExportTraceServiceResponse:  # noqa: N802
        with self._lock:
            self.received += str(request)
            for resource in request.resource_spans:
                self.resources.append({one.key: one.value.string_value for one in resource.resource.attributes})
                self._spans += [span for scope in resource.scope_spans for span in scope.spans]
        return pb.ExportTraceServiceResponse()

    def request(self, request_id: str) -> Span | None:
        """The span of a request, once it has come."""
        with self._lock:
            found = [one for one in self._spans if attributes(one).get("gen_ai.response.id") == request_id]
        return found[0] if found else None

    def children(self, parent: Span) -> dict[str, list[Span]]:
        """The spans directly below another, by name."""
        below: dict[str, list[Span]] = {}
        with self._lock:
            for one in self._spans:
                if one.parent_span_id == parent.span_id:
                    below.setdefault(one.name, []).append(one)
        return below

    def __enter__(self) -> Self:
        self._server.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.stop(0)
