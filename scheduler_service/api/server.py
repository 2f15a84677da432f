"""The life of one api process: assembled, serving, drained."""

import asyncio
import gc
import logging
import signal
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from baton_protos import generation_pb2, generation_pb2_grpc
from scheduler_service.api.checkpoint import Checkpoint, load_checkpoint
from scheduler_service.api.engine_client import EngineClient, EngineListener
from scheduler_service.api.health import HealthServicer
from scheduler_service.api.intake import Intake
from scheduler_service.api.metrics import RequestMetrics, share_metrics
from scheduler_service.api.servicer import GenerationServicer
from scheduler_service.config import ProcessSpec

_log = logging.getLogger("baton.api")

_SERVICE = generation_pb2.DESCRIPTOR.services_by_name["Generation"].full_name
# Above the largest allowed prompt, so that validation answers and not the transport.
_MAX_RECEIVE_BYTES = 32 * 1024 * 1024
# After the grace period, callers get this long to read how their streams ended.
_LAST_WORDS = 1.0  # seconds


class ApiServer:
    """A gRPC server and its connection to the engine. Create it on the event loop that will run it."""

    def __init__(self, spec: ProcessSpec, checkpoint: Checkpoint) -> None:
        settings = spec.settings
        self._grace = settings.shutdown_grace
        self._engine = EngineClient(spec.engine_endpoint, spec.index)
        if spec.metrics_directory is not None:
            share_metrics(spec.metrics_directory, spec.index)
        self._intake = Intake(
            checkpoint, settings.model_name, self._engine, settings.max_queued_requests, RequestMetrics()
        )
        self._health = HealthServicer((health.OVERALL_HEALTH, _SERVICE))
        self._server = grpc.aio.server(options=_options(reuse_port=spec.reuse_port))
        servicer = GenerationServicer(self._intake, self._engine, checkpoint, settings.model_name)
        generation_pb2_grpc.add_GenerationServicer_to_server(servicer, self._server)  # type: ignore[no-untyped-call]
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        reflection.enable_server_reflection((_SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME), self._server)
        host = f"[{settings.host}]" if ":" in settings.host else settings.host
        self.port = self._server.add_insecure_port(f"{host}:{settings.port}")

    @property
    def engine_lost(self) -> "asyncio.Future[str]":
        """Done when the engine is given up, with the reason; the server must stop then."""
        return self._engine.lost

    async def start(self) -> None:
        """Serve; NOT_SERVING until an executor is ready."""
        self._engine.start(
            EngineListener(
                limits=lambda limits: self._health.set_serving(limits.ready_executors > 0),
                forward_abort=lambda message: self._intake.abort(message.request_ids),
            )
        )
        await self._server.start()

    async def stop(self) -> None:
        """Refuse new requests, give running ones their grace period, end the rest UNAVAILABLE."""
        self._health.close()
        grace = 0.0 if self._engine.lost.done() else self._grace
        # Closes the listener at once, so that new connections go to other processes.
        stopping = asyncio.create_task(self._server.stop(grace + _LAST_WORDS))
        await self._intake.drain(grace)
        await stopping
        self._intake.close()
        self._engine.close()


async def serve(spec: ProcessSpec) -> int:
    """Run an api process until SIGTERM or the engine's loss; the exit code.

    Raises:
        FileNotFoundError, ValueError: the checkpoint cannot be read.
        RuntimeError: the port cannot be bound.
    """
    server = ApiServer(spec, load_checkpoint(spec.settings.model))
    terminated = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, terminated.set)
    await server.start()
    # Long-lived objects need no second look by the collector.
    gc.collect()
    gc.freeze()
    _log.info("api process %d serves %s on port %d", spec.index, spec.settings.model_name, server.port)
    stop = asyncio.create_task(terminated.wait())
    ends: list[asyncio.Future[Any]] = [stop, server.engine_lost]
    await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
    stop.cancel()
    await server.stop()
    if server.engine_lost.done():
        _log.error("engine lost: %s", server.engine_lost.result())
        return 1
    return 0


def _options(*, reuse_port: bool) -> list[tuple[str, int]]:
    return [
        ("grpc.so_reuseport", int(reuse_port)),
        ("grpc.max_receive_message_length", _MAX_RECEIVE_BYTES),
        # Clients may ping idle connections every 5 s or slower; the server finds clients that vanished.
        ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.keepalive_time_ms", 30_000),
        ("grpc.keepalive_timeout_ms", 10_000),
        ("grpc.http2.max_pings_without_data", 0),
    ]
