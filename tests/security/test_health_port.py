"""The plaintext port for probes: health, whatever the gRPC port asks of callers, and nothing else."""

import asyncio
import contextlib
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from baton import AsyncClient, Credentials
from baton_protos import admin_pb2, admin_pb2_grpc, generation_pb2, generation_pb2_grpc, open_inference_pb2_grpc
from baton_protos import open_inference_pb2 as oip
from tests.api.conftest import Serve, free_port
from tests.api.fake_engine import FakeEngine

STATES = health_pb2.HealthCheckResponse
_HELLO = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\4\0\0\0\0\0"  # HTTP/2's preface and empty settings


def mutual_tls(keys: Path) -> dict[str, Path]:
    return {
        "tls_cert": keys / "server.crt",
        "tls_key": keys / "server.key",
        "tls_client_ca": keys / "ca.crt",
        "tokens": keys / "tokens",
    }


async def test_probes_need_neither_certificate_nor_token(engine: FakeEngine, serve: Serve, keys: Path) -> None:
    engine.limits.ready_executors = 0
    port = free_port()
    served = await serve(health_port=port, **mutual_tls(keys))
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        health = health_pb2_grpc.HealthStub(channel)
        watch = health.Watch(health_pb2.HealthCheckRequest(service="baton.v1.Generation"))
        for ready, status in ((0, STATES.NOT_SERVING), (1, STATES.SERVING), (0, STATES.NOT_SERVING)):
            await engine.set_limits(ready_executors=ready)
            assert (await watch.read()).status == status
            for service in ("", "baton.v1.Generation"):
                assert (await health.Check(health_pb2.HealthCheckRequest(service=service))).status == status
    # The other port is as closed as ever.
    async with grpc.aio.insecure_channel(f"127.0.0.1:{served.server.port}") as channel:
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=10)
        assert refused.value.code() == grpc.StatusCode.UNAVAILABLE


async def test_nothing_else_is_served_there(serve: Serve, keys: Path) -> None:
    port = free_port()
    served = await serve(health_port=port, **mutual_tls(keys))
    request = generation_pb2.GenerateRequest(text="a", stop=generation_pb2.StopConditions(max_tokens=1))
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        generation = generation_pb2_grpc.GenerationStub(channel)
        asked = iter([reflection_pb2.ServerReflectionRequest(list_services="")])
        calls: list[Any] = [
            generation.Generate(request),
            generation.GenerateStream(request).read(),
            generation.GetModelInfo(generation_pb2.GetModelInfoRequest()),
            admin_pb2_grpc.AdminStub(channel).DrainExecutor(admin_pb2.DrainExecutorRequest(executor_id="e")),
            open_inference_pb2_grpc.GRPCInferenceServiceStub(channel).ModelInfer(oip.ModelInferRequest()),
            reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(asked).read(),
        ]
        for call in calls:
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await call
            assert refused.value.code() == grpc.StatusCode.UNIMPLEMENTED
    credentials = Credentials(
        ca=keys / "ca.crt",
        cert=keys / "client-caller.crt",
        key=keys / "client-caller.key",
        token=(keys / "token-acme").read_text().strip(),
    )
    async with AsyncClient(f"127.0.0.1:{served.server.port}", credentials=credentials) as client:
        assert (await client.generate("a", max_tokens=1, timeout=30)).token_ids


async def test_api_processes_share_the_port(engine: FakeEngine, serve: Serve) -> None:
    port = free_port()
    for index in range(2):
        await serve(index=index, reuse_port=True, health_port=port)
    for index in range(8):
        # A connection of its own for each, or all would be one.
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", [("baton.test", index)]) as channel:
            answer = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=10)
            assert answer.status == STATES.SERVING


async def test_connections_are_limited(serve: Serve) -> None:
    port = free_port()
    await serve(health_port=port)
    async with contextlib.AsyncExitStack() as stack:
        squatters = [await _dial(port) for _ in range(64)]
        for _, writer in squatters:
            stack.callback(writer.close)
        reader, writer = await _dial(port)
        stack.callback(writer.close)
        with contextlib.suppress(ConnectionError):
            async with asyncio.timeout(20):
                assert await reader.read() == b""  # closed before anything was said
        assert not any(reader.at_eof() for reader, _ in squatters)
        squatters[0][1].close()
        await squatters[0][1].wait_closed()
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            check = health_pb2_grpc.HealthStub(channel).Check
            answer = await check(health_pb2.HealthCheckRequest(), timeout=20, wait_for_ready=True)
            assert answer.status == STATES.SERVING


async def _dial(port: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A connection that speaks HTTP/2 and asks for nothing."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(_HELLO)
    return reader, writer
