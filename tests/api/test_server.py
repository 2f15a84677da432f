"""Health, reflection, the engine's loss, shutdown; and the real process."""

import asyncio
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from baton_protos import generation_pb2 as pb
from baton_protos import generation_pb2_grpc
from scheduler_service.config import ProcessSpec, SchedulerSettings

from .conftest import Serve, until
from .fake_engine import FakeEngine

SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING
REQUEST = pb.GenerateRequest(token_ids=pb.TokenIds(ids=[5]), stop=pb.StopConditions(max_tokens=900, ignore_eos=True))


def health_check(service: str = "") -> health_pb2.HealthCheckRequest:
    return health_pb2.HealthCheckRequest(service=service)


async def test_health_follows_executors(engine: FakeEngine, serve: Serve) -> None:
    engine.limits.ready_executors = 0
    served = await serve()
    health = health_pb2_grpc.HealthStub(served.channel)
    services = ("", "baton.v1.Generation")
    watches = [health.Watch(health_check(service)) for service in services]
    leaver = health.Watch(health_check())
    assert (await leaver.read()).status == NOT_SERVING
    leaver.cancel()  # must not silence the others
    for ready, status in ((0, NOT_SERVING), (2, SERVING), (0, NOT_SERVING), (1, SERVING)):
        await engine.set_limits(ready_executors=ready)
        for service, watch in zip(services, watches, strict=True):
            assert (await watch.read()).status == status
            assert (await health.Check(health_check(service))).status == status
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await health.Check(health_check("nobody"))
    assert error.value.code() == grpc.StatusCode.NOT_FOUND
    stopping = asyncio.ensure_future(served.server.stop())
    for watch in watches:
        assert (await watch.read()).status == NOT_SERVING
    await stopping


async def test_reflection(serve: Serve) -> None:
    stub = reflection_pb2_grpc.ServerReflectionStub((await serve()).channel)
    asked = [reflection_pb2.ServerReflectionRequest(list_services="")]
    (answer,) = [answer async for answer in stub.ServerReflectionInfo(iter(asked))]
    names = {service.name for service in answer.list_services_response.service}
    assert names == {
        "baton.v1.Admin",
        "baton.v1.Generation",
        "grpc.health.v1.Health",
        "grpc.reflection.v1alpha.ServerReflection",
        "inference.GRPCInferenceService",
    }


async def ends_with(call: Any, code: grpc.StatusCode) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as error:
        while await call.read() is not grpc.aio.EOF:
            pass
    assert error.value.code() == code


async def test_silent_engine_fails_streams(engine: FakeEngine, serve: Serve) -> None:
    served = await serve()
    call = served.stub.GenerateStream(REQUEST)
    await call.read()
    unary = served.stub.Generate(REQUEST)
    engine.silent = True
    begun = asyncio.get_running_loop().time()
    await ends_with(call, grpc.StatusCode.UNAVAILABLE)
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await unary
    assert error.value.code() == grpc.StatusCode.UNAVAILABLE
    assert 2.0 < asyncio.get_running_loop().time() - begun < 6.0
    assert served.server.engine_lost.done()
    await ends_with(served.stub.GenerateStream(REQUEST), grpc.StatusCode.UNAVAILABLE)
    assert (await health_pb2_grpc.HealthStub(served.channel).Check(health_check())).status == NOT_SERVING
    with pytest.raises(grpc.aio.AioRpcError):
        await served.stub.GetClusterStatus(pb.GetClusterStatusRequest(), timeout=5)


async def test_bad_frame_means_engine_lost(engine: FakeEngine, serve: Serve) -> None:
    served = await serve()
    call = served.stub.GenerateStream(REQUEST)
    await call.read()
    await engine.send_raw(b"\xff\xff\xff")
    await ends_with(call, grpc.StatusCode.UNAVAILABLE)
    assert served.server.engine_lost.done()


async def test_shutdown_lets_short_requests_finish(engine: FakeEngine, serve: Serve) -> None:
    served = await serve(shutdown_grace=2.0)
    short = pb.GenerateRequest(token_ids=pb.TokenIds(ids=[5]), stop=pb.StopConditions(max_tokens=100, ignore_eos=True))
    running = asyncio.ensure_future(served.stub.Generate(short))
    endless = served.stub.GenerateStream(REQUEST)
    engine.token = lambda submit, index: 9
    await until(lambda: len(engine.submits) == 2)
    engine.step_seconds = 0.01
    stopping = asyncio.ensure_future(served.server.stop())
    await asyncio.sleep(0.05)
    await ends_with(served.stub.GenerateStream(REQUEST), grpc.StatusCode.UNAVAILABLE)
    assert len((await running).samples[0].token_ids) == 100
    await ends_with(endless, grpc.StatusCode.UNAVAILABLE)
    await stopping
    await until(lambda: len(engine.aborted) == 1)


def free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@asynccontextmanager
async def api_process(engine: FakeEngine, checkpoint: Path, **settings: Any) -> AsyncIterator[Any]:
    """The real process, and a channel to it that is ready."""
    port = free_port()
    spec = ProcessSpec(
        settings=SchedulerSettings(model=checkpoint, port=port, shutdown_grace=0.5, **settings),
        scheduler_id="s",
        engine_endpoint=engine.endpoint,
    )
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "scheduler_service.api", spec.model_dump_json(), stderr=subprocess.PIPE
    )
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            await asyncio.wait_for(channel.channel_ready(), 20)
            await until(lambda: engine.peers)
            yield process, channel
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def test_process(engine: FakeEngine, checkpoint: Path) -> None:
    async with api_process(engine, checkpoint) as (process, channel):
        stub = generation_pb2_grpc.GenerationStub(channel)
        message = pb.ChatMessage(role="user", content="a secret prompt")
        chat = pb.GenerateRequest(
            chat=pb.ChatMessages(messages=[message]), stop=pb.StopConditions(max_tokens=50, ignore_eos=True)
        )
        response = await stub.Generate(chat, wait_for_ready=True)
        assert len(response.samples[0].token_ids) == 50
        assert "libtorch" not in Path(f"/proc/{process.pid}/maps").read_text()
        endless = stub.GenerateStream(REQUEST)
        await endless.read()
        process.send_signal(signal.SIGINT)  # the launcher's business
        await endless.read()
        process.terminate()
        await ends_with(endless, grpc.StatusCode.UNAVAILABLE)
        assert await asyncio.wait_for(process.wait(), 5) == 0
        log = (await process.stderr.read()).decode()
        assert "serves" in log and "secret" not in log and "Traceback" not in log


async def test_process_ends_without_engine(engine: FakeEngine, checkpoint: Path) -> None:
    async with api_process(engine, checkpoint) as (process, channel):
        call = generation_pb2_grpc.GenerationStub(channel).GenerateStream(REQUEST, wait_for_ready=True)
        await call.read()
        engine.silent = True
        await ends_with(call, grpc.StatusCode.UNAVAILABLE)
        assert await asyncio.wait_for(process.wait(), 5) == 1


def run_python(code: str, *arguments: str) -> str:
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout


def test_no_torch() -> None:
    code = "import sys, scheduler_service.api.__main__, scheduler_service.api.server; print(sorted(sys.modules))"
    assert not {"'torch'", "'transformers'"} & set(run_python(code).strip("[]\n").split(", "))


def test_child_dies_with_its_parent() -> None:
    child = (
        "import time; from scheduler_service.process import die_with_parent\n"
        "die_with_parent(); print('up', flush=True); time.sleep(60)"
    )
    parent = (
        "import subprocess, sys\n"
        "child = subprocess.Popen([sys.executable, '-c', sys.argv[1]], stdout=subprocess.PIPE)\n"
        "child.stdout.readline(); print(child.pid)"
    )
    pid = int(run_python(parent, child))
    for _ in range(100):
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
        except FileNotFoundError:
            return
        if state == "Z":  # nobody collects orphans in some containers
            return
        time.sleep(0.02)
    raise AssertionError("the child outlived its parent")


def test_bad_checkpoint(tmp_path: Path) -> None:
    spec = ProcessSpec(
        settings=SchedulerSettings(model=tmp_path / "nowhere"), scheduler_id="s", engine_endpoint=f"ipc://{tmp_path}/e"
    )
    command = [sys.executable, "-m", "scheduler_service.api", spec.model_dump_json()]
    result = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)
    assert result.returncode == 2 and "no checkpoint directory" in result.stderr


async def test_port_in_use(serve: Serve) -> None:
    served = await serve()
    with pytest.raises(RuntimeError):
        await serve(index=1, port=served.server.port)


async def test_port_shared_by_several_processes(serve: Serve) -> None:
    port = free_port()
    for index in range(2):
        served = await serve(index=index, port=port, reuse_port=True)
        assert served.server.port == port
