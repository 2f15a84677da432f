"""The HTTP port that Prometheus scrapes."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.multiprocess import MultiProcessCollector

from scheduler_service.config import ProcessSpec
from scheduler_service.listen import PortInUseError
from scheduler_service.metrics.engine_collector import EngineCollector
from scheduler_service.metrics.engine_probe import EngineProbe


@contextmanager
def serve_metrics(spec: ProcessSpec, directory: Path) -> Iterator[None]:
    """Serve the metrics of all processes, on threads of this one; those of api processes are in ``directory``.

    Raises:
        PortInUseError: the port cannot be bound.
    """
    settings = spec.settings
    probe = EngineProbe(spec.engine_endpoint)
    registry = CollectorRegistry()
    registry.register(EngineCollector(probe.ask, settings.model_name))
    MultiProcessCollector(registry, str(directory))  # type: ignore[no-untyped-call]
    try:
        server, _ = start_http_server(settings.metrics_port, settings.metrics_host, registry)
    except OSError as error:
        where = f"{settings.metrics_host}:{settings.metrics_port}"
        raise PortInUseError(f"cannot serve metrics on {where}: {error.strerror}") from error
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
        probe.close()
