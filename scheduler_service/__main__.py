"""``python -m scheduler_service``: starts the engine and the api processes, and ends when they must end."""

import importlib.util
import logging
import os
import secrets
import signal
import sys
import tempfile
from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path
from types import FrameType

from scheduler_service.config import ConfigError, ProcessSpec, SchedulerSettings, load_settings
from scheduler_service.exposure import check_security, warn_if_open
from scheduler_service.launcher import Launcher, StartError
from scheduler_service.listen import PortInUseError, reserve_port
from scheduler_service.process import configure_logging, die_with_parent

USAGE_ERROR = 2


def main() -> int:
    """Run a scheduler; prints where it listens on stdout once it does. The exit code."""
    if os.environ.get("BATON_DIE_WITH_PARENT"):
        die_with_parent()
    try:
        settings = load_settings(sys.argv[1:])
        check_security(settings)
        _check_extras(settings)
    except ConfigError as error:
        return _fail(str(error))
    if not (settings.model / "config.json").is_file():
        return _fail(f"{settings.model} is no checkpoint: it has no config.json")
    configure_logging(settings.log_level, settings.log_format)
    warn_if_open(settings)
    try:
        return _run(settings)
    except PortInUseError as error:
        return _fail(str(error))


def _check_extras(settings: SchedulerSettings) -> None:
    """Raises ConfigError when something is wanted that is not installed."""
    if settings.vllm_grpc_port and not _is_installed("smg_grpc_proto"):
        raise ConfigError("--vllm-grpc-port needs the protocol's package: pip install 'baton[smg]'")
    if settings.tracing and not _is_installed("opentelemetry.exporter.otlp.proto.grpc"):
        raise ConfigError("--tracing needs OpenTelemetry: pip install 'baton[tracing]'")


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # not even the packages it would be in
        return False


def _run(settings: SchedulerSettings) -> int:
    shared = settings.api_processes > 1
    with (
        reserve_port(settings.host, settings.port, shared=shared) as reservation,
        _reserve_if_asked(settings.vllm_grpc_host, settings.vllm_grpc_port, shared=shared),
        _reserve_if_asked(settings.health_host, settings.health_port, shared=shared),
        tempfile.TemporaryDirectory(prefix="baton-") as directory,
        ExitStack() as stack,
    ):
        spec = ProcessSpec(
            settings=settings.model_copy(update={"port": reservation.port}),
            scheduler_id=secrets.token_hex(8),
            engine_endpoint=f"ipc://{Path(directory) / 'engine'}",
            reuse_port=shared,
            metrics_directory=Path(directory) if settings.metrics_port else None,
        )
        if spec.metrics_directory is not None:
            from scheduler_service.metrics.endpoint import serve_metrics  # most launchers never need what it loads

            stack.enter_context(serve_metrics(spec, spec.metrics_directory))
        return _serve(spec)


def _reserve_if_asked(host: str, port: int, *, shared: bool) -> AbstractContextManager[object]:
    return reserve_port(host, port, shared=shared) if port else nullcontext()


def _serve(spec: ProcessSpec) -> int:
    launcher = Launcher(spec)

    def stop(signum: int, frame: FrameType | None) -> None:
        launcher.stop()

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    try:
        executor_endpoint = launcher.start()
        print(f"listening: grpc {spec.settings.host}:{spec.settings.port} executors {executor_endpoint}", flush=True)
        return launcher.supervise()
    except StartError as error:
        return _fail(str(error))
    finally:
        launcher.close()


def _fail(message: str) -> int:
    if message:
        print(f"error: {message}", file=sys.stderr)
    logging.shutdown()
    return USAGE_ERROR


if __name__ == "__main__":
    sys.exit(main())
