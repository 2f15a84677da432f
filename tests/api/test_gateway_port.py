"""The gateways' port of real schedulers: shared by all api processes, and never by two schedulers."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest
from smg_grpc_proto.generated import vllm_engine_pb2, vllm_engine_pb2_grpc

from scheduler_service.config import ConfigError, load_settings
from scheduler_service.exposure import check_security

from .conftest import free_port

ROOT = Path(__file__).parents[2]


@contextmanager
def scheduler(model: Path, port: int, *flags: str) -> Iterator[subprocess.Popen[str]]:
    settings = {"model": model, "port": 0, "executor-endpoint": "tcp://127.0.0.1:0", "vllm-grpc-port": port}
    values = [part for name, value in settings.items() for part in (f"--{name}", str(value))]
    command = [sys.executable, "-m", "scheduler_service", *values, *flags]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        process.terminate()
        process.communicate(timeout=30)


def test_api_processes_share_the_port(checkpoint: Path) -> None:
    port = free_port()
    with scheduler(checkpoint, port, "--api-processes", "2") as first:
        assert first.stdout is not None
        assert first.stdout.readline().startswith("listening: ")
        for index in range(8):
            # A connection of its own for each, or all would be one.
            with grpc.insecure_channel(f"127.0.0.1:{port}", [("baton.test", index)]) as channel:
                stub = vllm_engine_pb2_grpc.VllmEngineStub(channel)
                answer = stub.HealthCheck(vllm_engine_pb2.HealthCheckRequest(), wait_for_ready=True, timeout=30)
                assert (answer.healthy, answer.message) == (False, "no executor is ready")
        with scheduler(checkpoint, port) as second:
            _, errors = second.communicate(timeout=60)
            assert second.returncode == 2
            assert errors == f"error: cannot listen on 127.0.0.1:{port}: the port is in use\n"


def test_the_port_stays_on_this_machine_unless_told_otherwise() -> None:
    exposed = ["--model", "m", "--vllm-grpc-host", "0.0.0.0"]
    check_security(load_settings(exposed))  # there is no port
    exposed += ["--vllm-grpc-port", "1234"]
    with pytest.raises(ConfigError, match=r"--vllm-grpc-host: 0\.0\.0\.0 .*without TLS or tokens.*--insecure"):
        check_security(load_settings(exposed))
    check_security(load_settings([*exposed, "--insecure"]))
