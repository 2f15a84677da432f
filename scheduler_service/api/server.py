"""The life of one api process: assembled, serving, drained."""

import asyncio
import gc
import logging
import signal
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import grpc
from grpc_health.v1 import health, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from baton_protos import admin_pb2, admin_pb2_grpc, generation_pb2, generation_pb2_grpc, open_inference_pb2_grpc
from scheduler_service.api.admin.servicer import AdminServicer
from scheduler_service.api.auth import TokenFile, TokenInterceptor
from scheduler_service.api.checkpoint import Checkpoint, load_checkpoint
from scheduler_service.api.credentials import server_credentials
from scheduler_service.api.engine_client import EngineClient, EngineListener
from scheduler_service.api.grpc_log import log_callers_faults_once
from scheduler_service.api.health import HealthServicer, health_server
from scheduler_service.api.holds import Holds
from scheduler_service.api.intake import Intake
from scheduler_service.api.metrics import RequestMetrics, share_metrics
from scheduler_service.api.open_inference import servicer as open_inference
from scheduler_service.api.records import RequestRecorder, Sink
from scheduler_service.api.request_log import log_request
from scheduler_service.api.servicer import GenerationServicer
from scheduler_service.api.structured import GrammarChecker
from scheduler_service.config import ProcessSpec, SchedulerSettings

if TYPE_CHECKING:
    from scheduler_service.api.tracing import Tracer

_log = logging.getLogger("baton.api")

_SERVICE = generation_pb2.DESCRIPTOR.services_by_name["Generation"].full_name
_GATEWAY_SERVICE = "vllm.grpc.engine.VllmEngine"
_ADMIN_SERVICE = admin_pb2.DESCRIPTOR.services_by_name["Admin"].full_name
# Above the largest allowed prompt, so that validation answers and not the transport.
_MAX_RECEIVE_BYTES = 32 * 1024 * 1024
# Of one connection; further calls wait on the caller's side.
_MAX_STREAMS = 4096
# A traceparent, a token and a few more headers; gRPC would refuse at random between two differing limits.
_MAX_METADATA_BYTES = 16 * 1024
# After the grace period, callers get this long to read how their streams ended.
_LAST_WORDS = 1.0  # seconds
_LAST_SPANS = 0.4  # seconds that a collector may take to listen; the launcher kills half a second after the last words


class ApiServer:
    """A gRPC server and its connection to the engine. Create it on the event loop that will run it."""

    def __init__(self, spec: ProcessSpec, checkpoint: Checkpoint) -> None:
        settings = spec.settings
        self._grace = settings.shutdown_grace
        self._engine = EngineClient(spec.engine_endpoint, spec.index, window=settings.unread_window)
        if spec.metrics_directory is not None:
            share_metrics(spec.metrics_directory, spec.index)
        interceptors: list[Any] = [] if settings.tokens is None else [TokenInterceptor(TokenFile(settings.tokens))]
        sinks: list[Sink] = [log_request] if settings.log_requests else []
        self._tracer: Tracer | None = None
        if settings.tracing:
            from scheduler_service.api import tracing  # what it loads is an optional extra

            self._tracer = tracing.Tracer(settings.model_name, f"{spec.scheduler_id}-{spec.index}")
            sinks.append(self._tracer.trace)
            interceptors.append(tracing.ContextInterceptor())
        self._metrics = RequestMetrics()
        recorder = RequestRecorder(self._metrics, sinks)
        holds = Holds(settings.max_held_requests, self._metrics.hold_ended)
        grammars = GrammarChecker.of_checkpoint(settings.model, checkpoint.eos_token_ids, settings.grammar_timeout)
        self._intake = Intake(
            checkpoint, settings.model_name, self._engine, settings.max_queued_requests, recorder, grammars, holds
        )
        self._health = HealthServicer((health.OVERALL_HEALTH, _SERVICE, *_dialects(settings)))
        self._server = grpc.aio.server(interceptors=interceptors, options=_options(reuse_port=spec.reuse_port))
        servicer = GenerationServicer(
            self._intake, self._engine, checkpoint, settings.model_name, settings.slow_client_timeout
        )
        generation_pb2_grpc.add_GenerationServicer_to_server(servicer, self._server)  # type: ignore[no-untyped-call]
        admin_pb2_grpc.add_AdminServicer_to_server(AdminServicer(self._engine), self._server)  # type: ignore[no-untyped-call]
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        services = [_SERVICE, _ADMIN_SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME]
        self._open_inference: open_inference.OpenInferenceServicer | None = None
        if settings.open_inference:
            self._open_inference = self._add_open_inference(settings)
            services.append(open_inference.SERVICE)
        reflection.enable_server_reflection(services, self._server)
        address = _address(settings.host, settings.port)
        if settings.tls is None:
            self.port = self._server.add_insecure_port(address)
        else:
            self.port = self._server.add_secure_port(address, server_credentials(settings.tls))
        self._servers = [self._server]
        if settings.vllm_grpc_port:
            self._servers.append(self._gateway_server(spec, checkpoint))
        if settings.health_port:
            address = _address(settings.health_host, settings.health_port)
            self._servers.append(health_server(self._health, address, reuse_port=spec.reuse_port))

    def _add_open_inference(self, settings: SchedulerSettings) -> open_inference.OpenInferenceServicer:
        servicer = open_inference.OpenInferenceServicer(
            self._intake, self._engine, settings.model_name, settings.slow_client_timeout
        )
        add_to = open_inference_pb2_grpc.add_GRPCInferenceServiceServicer_to_server
        add_to(servicer, self._server)  # type: ignore[no-untyped-call]
        return servicer

    def _gateway_server(self, spec: ProcessSpec, checkpoint: Checkpoint) -> grpc.aio.Server:
        from scheduler_service.api.vllm_engine.server import gateway_server  # what they load is an optional extra
        from scheduler_service.api.vllm_engine.servicer import VllmEngineServicer

        settings = spec.settings
        servicer = VllmEngineServicer(
            self._intake,
            self._engine,
            checkpoint,
            settings.model,
            settings.model_name,
            settings.slow_client_timeout,
        )
        address = _address(settings.vllm_grpc_host, settings.vllm_grpc_port)
        return gateway_server(servicer, self._health, address, _options(reuse_port=spec.reuse_port))

    @property
    def engine_lost(self) -> "asyncio.Future[str]":
        """Done when the engine is given up, with the reason; the server must stop then."""
        return self._engine.lost

    async def start(self) -> None:
        """Serve; NOT_SERVING until an executor is ready."""
        self._engine.start(
            EngineListener(
                limits=lambda limits: self._health.set_serving(limits.ready_executors > 0),
                forward_abort=self._intake.abort_forwarded,
            )
        )
        for server in self._servers:
            await server.start()

    async def stop(self) -> None:
        """Refuse new requests, give running ones their grace period, end the rest UNAVAILABLE."""
        self._health.close()
        grace = 0.0 if self._engine.lost.done() else self._grace
        # Closes the listener at once, so that new connections go to other processes.
        stopping = [asyncio.create_task(server.stop(grace + _LAST_WORDS)) for server in self._servers]
        await self._intake.drain(grace)
        if self._open_inference is not None:
            self._open_inference.close()
        await asyncio.gather(*stopping)
        await self._intake.close()
        self._engine.close()
        if self._tracer is not None:
            self._tracer.close(_LAST_SPANS)


async def serve(spec: ProcessSpec) -> int:
    """Run an api process until SIGTERM or the engine's loss; the exit code.

    Raises:
        FileNotFoundError, ValueError: the checkpoint cannot be read.
        RuntimeError: the port cannot be bound.
    """
    log_callers_faults_once()
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


def _dialects(settings: SchedulerSettings) -> Iterator[str]:
    """Services besides our own that take requests."""
    if settings.open_inference:
        yield open_inference.SERVICE
    if settings.vllm_grpc_port:
        yield _GATEWAY_SERVICE


def _address(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _options(*, reuse_port: bool) -> list[tuple[str, int]]:
    return [
        ("grpc.so_reuseport", int(reuse_port)),
        ("grpc.max_receive_message_length", _MAX_RECEIVE_BYTES),
        ("grpc.max_concurrent_streams", _MAX_STREAMS),
        ("grpc.max_metadata_size", _MAX_METADATA_BYTES),
        ("grpc.absolute_max_metadata_size", _MAX_METADATA_BYTES),
        # Clients may ping idle connections every 5 s or slower; the server finds clients that vanished.
        ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.keepalive_time_ms", 30_000),
        ("grpc.keepalive_timeout_ms", 10_000),
        ("grpc.http2.max_pings_without_data", 0),
    ]
