"""The asyncio client against a scripted server; what both clients share is tested with the synchronous one."""

import asyncio
from collections.abc import AsyncIterator

import grpc
import pytest
from google.rpc.error_details_pb2 import BadRequest
from grpc_health.v1 import health_pb2

from baton import (
    AsyncClient,
    BatonError,
    DeadlineExceededError,
    ExecutorNotFoundError,
    InvalidRequestError,
    ProtocolError,
    RequestCancelledError,
    UnavailableError,
)
from baton_protos import generation_pb2 as pb
from tests.client.fake_server import SILENCE, FakeServer, chunk, end, failure, start

CANCEL_SECONDS = 5.0


@pytest.fixture
async def aclient(server: FakeServer) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(server.address) as connected:
        yield connected


async def cancelled(server: FakeServer) -> bool:
    return await asyncio.to_thread(server.cancelled.wait, CANCEL_SECONDS)


async def test_generate(server: FakeServer, aclient: AsyncClient) -> None:
    server.stream = [start(), chunk(0, [4, 5], "hello", 0), end(2, pb.FINISH_REASON_STOP)]
    assert (await aclient.generate("hi", seed=1)).text == "hello"
    assert server.requests[0].sampling.seed == 1


async def test_stream(server: FakeServer, aclient: AsyncClient) -> None:
    server.stream = [start(), chunk(0, [4], "he", 0), chunk(1, [5], "llo", 2), end(2)]
    async with aclient.stream("hi") as stream:
        assert [delta.text async for delta in stream] == ["he", "llo"]
    assert stream.completion.text == "hello"
    assert (await aclient.stream("hi").result()).request_id == "r1"


async def test_close_cancels_and_later_reads_say_so(server: FakeServer, aclient: AsyncClient) -> None:
    server.stream = [start(), chunk(0, [4], "he", 0), SILENCE]
    stream = aclient.stream("hi")
    await anext(stream)
    with pytest.raises(RuntimeError, match="result"):
        _ = stream.completion
    stream.close()
    assert await cancelled(server)
    with pytest.raises(RequestCancelledError):
        await anext(stream)


async def test_leaving_the_block_cancels(server: FakeServer, aclient: AsyncClient) -> None:
    server.stream = [start(), chunk(0, [4], "he", 0), SILENCE]
    async with aclient.stream("hi") as stream:
        async for _ in stream:
            break
    assert await cancelled(server)


async def test_cancelling_the_task_cancels(server: FakeServer, aclient: AsyncClient) -> None:
    server.stream = [start(), chunk(0, [4], "he", 0), SILENCE]
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(aclient.stream("hi").result(), 0.5)
    assert await cancelled(server)


async def test_a_hole_cancels(server: FakeServer, aclient: AsyncClient) -> None:
    server.stream = [start(), chunk(1, [4], "he", 0), SILENCE]
    with pytest.raises(ProtocolError):
        await aclient.stream("hi").result()
    assert await cancelled(server)


async def test_timeout(server: FakeServer, aclient: AsyncClient) -> None:
    server.stream = [start(), SILENCE]
    with pytest.raises(DeadlineExceededError):
        await aclient.stream("hi", timeout=0.3).result()


async def test_errors(server: FakeServer, aclient: AsyncClient) -> None:
    violation = BadRequest.FieldViolation(field="stop.max_tokens", description="no")
    status = failure(grpc.StatusCode.INVALID_ARGUMENT, "because", BadRequest(field_violations=[violation]))
    server.answer, server.stream = status, [status]
    for call in (aclient.generate("x"), aclient.stream("x").result()):
        with pytest.raises(InvalidRequestError, match="because") as caught:
            await call
        assert caught.value.field == "stop.max_tokens"


async def test_unavailable_is_retried_before_the_first_message(server: FakeServer, aclient: AsyncClient) -> None:
    server.refusals = 2
    server.stream = [start(), chunk(0, [4], "he", 0), end(1)]
    assert (await aclient.stream("hi").result()).token_ids == (4,)
    assert len(server.requests) == 3


async def test_small_calls(server: FakeServer, aclient: AsyncClient) -> None:
    assert await aclient.tokenize("ab") == (97, 98)
    assert await aclient.detokenize([97, 98]) == "ab"
    assert (await aclient.model_info()).vocab_size == 512
    assert (await aclient.cluster_status()).executors[0].executor_id == "executor-0"
    await aclient.abort("a")
    assert server.aborted == ["a"]


async def test_orders_of_an_operator(server: FakeServer, aclient: AsyncClient) -> None:
    await aclient.pause_executor("executor-0")
    await aclient.resume_executor("executor-0")
    await aclient.drain_executor("executor-0")
    assert server.orders == [("pause", "executor-0"), ("resume", "executor-0"), ("drain", "executor-0")]
    for order in (aclient.pause_executor, aclient.resume_executor, aclient.drain_executor):
        with pytest.raises(ExecutorNotFoundError, match="nobody"):
            await order("nobody")


async def test_wait_ready(server: FakeServer, aclient: AsyncClient) -> None:
    await aclient.wait_ready(timeout=5)
    server.health = health_pb2.HealthCheckResponse.NOT_SERVING
    with pytest.raises(UnavailableError, match="no executor"):
        await aclient.wait_ready(timeout=0.3)


async def test_closing_the_client_ends_its_streams(server: FakeServer) -> None:
    server.stream = [start(), chunk(0, [4], "he", 0), SILENCE]
    client = AsyncClient(server.address)
    stream = client.stream("hi")
    await anext(stream)
    waiting = asyncio.ensure_future(stream.result())
    await asyncio.sleep(0)
    await client.close()
    with pytest.raises(BatonError):
        await waiting


def test_a_client_may_be_made_outside_a_loop(server: FakeServer) -> None:
    client = AsyncClient(server.address)

    async def use() -> int:
        async with client:
            return (await client.model_info()).vocab_size

    assert asyncio.run(use()) == 512
