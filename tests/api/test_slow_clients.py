"""Clients that do not read: held, then cut off; their neighbours notice nothing."""

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from baton_protos import generation_pb2 as pb
from baton_protos import generation_pb2_grpc
from scheduler_service.api.outlet import Outlet

from .conftest import Serve, Served, until
from .fake_engine import FakeEngine
from .reading import ask, read

MAX_TOKENS = 5000
# Large messages, and a client that does not widen its window: gRPC's would take in megabytes before they block anybody.
BULKY = pb.OutputOptions(logprobs=20)
NARROW = [("grpc.http2.bdp_probe", 0)]


@pytest.fixture
def fast(engine: FakeEngine) -> None:
    engine.limits.max_total_tokens = 100_000
    engine.frames_per_step = 20


@pytest.fixture
async def narrow() -> AsyncIterator[Callable[[Served], Any]]:
    """Stubs with small windows."""
    channels: list[grpc.aio.Channel] = []

    def stub(served: Served) -> Any:
        channels.append(grpc.aio.insecure_channel(f"127.0.0.1:{served.server.port}", options=NARROW))
        return generation_pb2_grpc.GenerationStub(channels[-1])

    yield stub
    for channel in channels:
        await channel.close()


def slow(**fields: Any) -> pb.GenerateRequest:
    return ask(max_tokens=MAX_TOKENS, output=BULKY, **fields)


async def test_a_slow_stream_is_held_and_released(engine: FakeEngine, fast: None, serve: Serve, narrow: Any) -> None:
    served: Served = await serve(unread_window=200)
    messages = aiter(narrow(served).GenerateStream(slow()))
    await anext(messages)
    await until(lambda: engine.holds == [(engine.handle_of(0), True)])
    (running,) = engine.running.values()
    done = running.done
    await asyncio.sleep(0.2)
    assert running.done == done < MAX_TOKENS  # nothing is generated for nobody
    neighbour = await served.stub.Generate(ask(max_tokens=300))
    assert len(neighbour.samples[0].token_ids) == 300
    count = 0
    async for message in messages:
        count += len(message.chunk.token_ids)
    assert count == MAX_TOKENS
    held = [held for _, held in engine.holds]
    assert held == [True, False] * (len(held) // 2)  # in turn, and not held at the end


async def test_who_is_answered_once_is_not_held(engine: FakeEngine, fast: None, serve: Serve) -> None:
    served: Served = await serve(unread_window=200)
    response = await served.stub.Generate(ask(max_tokens=5000, n=2))
    assert [len(sample.token_ids) for sample in response.samples] == [5000, 5000]
    assert not engine.holds


async def test_a_stream_that_is_not_read_is_cut(engine: FakeEngine, fast: None, serve: Serve, narrow: Any) -> None:
    served: Served = await serve(unread_window=200, slow_client_timeout=0.5)
    messages = aiter(narrow(served).GenerateStream(slow()))
    await anext(messages)
    await until(lambda: engine.aborted == [engine.handle_of(0)])
    # Whoever comes back learns why, after what was under way.
    with pytest.raises(grpc.aio.AioRpcError) as error:
        async for _ in messages:
            pass
    assert error.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    status = rpc_status.from_call(error.value)
    retry = error_details_pb2.RetryInfo()
    assert any(detail.Unpack(retry) for detail in status.details)
    assert served.server._intake.num_live == 0


async def test_every_message_has_all_the_time() -> None:
    left: list[float] = []

    class Context:
        async def write(self, message: object) -> None:
            when = outlet._limit.when()
            assert when is not None
            left.append(when - asyncio.get_running_loop().time())
            await asyncio.sleep(0.01)

    async with Outlet(Context(), 60.0) as outlet:
        for _ in range(3):
            await outlet.write(b"")
            assert outlet._limit.when() is None  # waiting for tokens is not the client's fault
    assert len(left) == 3 and all(0.0 < seconds <= 60.0 for seconds in left)


async def test_a_held_stream_can_be_left(engine: FakeEngine, fast: None, serve: Serve, narrow: Any) -> None:
    served: Served = await serve(unread_window=200)
    call = narrow(served).GenerateStream(slow())
    await call.read()
    await until(lambda: engine.holds)
    call.cancel()
    await until(lambda: engine.aborted == [engine.handle_of(0)])


async def test_a_client_that_dies_while_it_is_held_is_noticed(engine: FakeEngine, fast: None, serve: Serve) -> None:
    served: Served = await serve(unread_window=200)
    channel = grpc.aio.insecure_channel(f"127.0.0.1:{served.server.port}", options=NARROW)
    call = generation_pb2_grpc.GenerationStub(channel).GenerateStream(slow())
    await call.read()
    await until(lambda: engine.holds)
    await channel.close()
    await until(lambda: engine.aborted == [engine.handle_of(0)])


async def test_a_request_that_waits_for_its_caller_is_held_too(engine: FakeEngine, fast: None, serve: Serve) -> None:
    served: Served = await serve(unread_window=200)
    request = ask(max_tokens=2000, request_id="a", resume_window_ms=60_000)
    call = served.stub.GenerateStream(request)
    await read(call, limit=3)
    call.cancel()
    await until(lambda: engine.holds)
    stream = await read(served.stub.GenerateStream(request))
    assert len(stream.only.token_ids) == 2000
    assert [held for _, held in engine.holds][:2] == [True, False]
