"""grpc.health.v1. The library's asyncio servicer loses watchers as soon as one of several leaves; this one does not."""
# ruff: noqa: N802 - gRPC names the methods

import asyncio
from typing import Any, TypeAlias

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"

# Of the port for probes, which anybody may dial: a request is the name of a service.
_MAX_REQUEST_BYTES = 4096
_MAX_STREAMS = 16  # per connection
_MAX_CONNECTIONS = 64  # of each api process; one more is closed as soon as it is accepted
# So that nobody keeps one for nothing: to say HTTP/2, without a call, to answer a ping.
_HANDSHAKE_MS = 5_000
_IDLE_MS = 30_000
_KEEPALIVE_MS, _KEEPALIVE_TIMEOUT_MS = 30_000, 10_000


class HealthServicer(health_pb2_grpc.HealthServicer):  # type: ignore[misc]
    """One state for all services of the process: whether requests would be served."""

    def __init__(self, services: tuple[str, ...]) -> None:
        self._services = frozenset(services)
        self._serving = False
        self._closed = False
        self._changed = asyncio.Event()

    def set_serving(self, serving: bool) -> None:
        """Tell callers and watchers; ignored after ``close``."""
        if not self._closed and serving != self._serving:
            self._serving = serving
            self._announce()

    def close(self) -> None:
        """NOT_SERVING for good; watchers learn it and their calls end, so that they do not hold up a shutdown."""
        self._serving = False
        self._closed = True
        self._announce()

    async def Check(self, request: health_pb2.HealthCheckRequest, context: Context) -> health_pb2.HealthCheckResponse:
        if request.service not in self._services:
            await context.abort(grpc.StatusCode.NOT_FOUND, "unknown service")
        return self._response(request.service)

    async def Watch(self, request: health_pb2.HealthCheckRequest, context: Context) -> None:
        last = None
        while True:
            changed = self._changed
            response = self._response(request.service)
            if response != last:
                await context.write(response)
                last = response
            if self._closed:
                return
            await changed.wait()

    def _announce(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    def _response(self, service: str) -> health_pb2.HealthCheckResponse:
        states = health_pb2.HealthCheckResponse
        if service not in self._services:
            return states(status=states.SERVICE_UNKNOWN)
        return states(status=states.SERVING if self._serving else states.NOT_SERVING)


def health_server(servicer: HealthServicer, address: str, *, reuse_port: bool) -> grpc.aio.Server:
    """A plaintext server of health alone, bound but not started: for probes that have no certificate to show.

    Raises:
        RuntimeError: the address cannot be bound.
    """
    options = [
        ("grpc.so_reuseport", int(reuse_port)),
        ("grpc.max_receive_message_length", _MAX_REQUEST_BYTES),
        ("grpc.max_concurrent_streams", _MAX_STREAMS),
        ("grpc.max_allowed_incoming_connections", _MAX_CONNECTIONS),
        ("grpc.server_handshake_timeout_ms", _HANDSHAKE_MS),
        ("grpc.max_connection_idle_ms", _IDLE_MS),
        ("grpc.keepalive_time_ms", _KEEPALIVE_MS),
        ("grpc.keepalive_timeout_ms", _KEEPALIVE_TIMEOUT_MS),
        ("grpc.http2.max_pings_without_data", 0),
    ]
    server = grpc.aio.server(options=options)
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    server.add_insecure_port(address)
    return server
