"""Deadlines and queue-time limits."""

import json
import time
from typing import Any

import grpc
import pytest

from baton_protos import engine_pb2, generation_pb2_grpc
from baton_protos import generation_pb2 as pb

from .conftest import Serve, until
from .fake_engine import CACHED_TOKENS, FakeEngine
from .reading import ask, read


def until_ms(seconds: float) -> dict[str, int]:
    return {"deadline_unix_ms": round((time.time() + seconds) * 1000)}


async def test_a_deadline_ends_a_request_with_what_there_is(engine: FakeEngine, stub: Any) -> None:
    stream = await read(stub.GenerateStream(ask(max_tokens=900, n=2, stop=until_ms(0.3))))
    for sample in stream.samples:
        assert sample.ended.finish_reason == pb.FINISH_REASON_DEADLINE
        assert 0 < len(sample.token_ids) == sample.ended.usage.completion_tokens < 900
        assert sample.ended.usage.cached_tokens == CACHED_TOKENS
    assert sorted(engine.aborted) == [submit.handle for submit in engine.submits]
    engine.step_seconds = 0.02
    response = await stub.Generate(ask(max_tokens=900, stop=until_ms(0.3)))
    (sample,) = response.samples
    assert sample.finish_reason == pb.FINISH_REASON_DEADLINE and 0 < len(sample.token_ids) < 900


async def test_a_deadline_in_the_past_submits_nothing(engine: FakeEngine, stub: Any) -> None:
    (sample,) = (await stub.Generate(ask(stop={"deadline_unix_ms": 1}))).samples
    assert (sample.finish_reason, list(sample.token_ids)) == (pb.FINISH_REASON_DEADLINE, [])
    assert not engine.submits


async def test_a_deadline_while_queued(engine: FakeEngine, stub: Any) -> None:
    engine.paused = True
    (sample,) = (await stub.Generate(ask(stop=until_ms(0.2)))).samples
    assert (sample.finish_reason, list(sample.token_ids)) == (pb.FINISH_REASON_DEADLINE, [])
    assert engine.aborted == [engine.submits[0].handle]


async def test_what_ends_before_its_deadline_ends_well(engine: FakeEngine, stub: Any) -> None:
    (sample,) = (await stub.Generate(ask(stop=until_ms(60)))).samples
    assert sample.finish_reason == pb.FINISH_REASON_LENGTH and not engine.aborted


async def test_the_calls_own_deadline_aborts(engine: FakeEngine, stub: Any) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await stub.Generate(ask(max_tokens=900), timeout=0.2)
    assert error.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    await until(lambda: engine.aborted == [engine.handle_of(0)])


async def test_who_waited_in_vain_is_told_not_to_retry_at_once(engine: FakeEngine, stub: Any) -> None:
    engine.verdict = engine_pb2.FinishedRequest(outcome=engine_pb2.OUTCOME_UNAVAILABLE, message="no executor")
    for call in (stub.Generate(ask()), read(stub.GenerateStream(ask()))):
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await call
        assert error.value.code() == grpc.StatusCode.UNAVAILABLE
        trailers = dict(error.value.trailing_metadata())
        assert trailers["grpc-retry-pushback-ms"] == "-1" and "grpc-status-details-bin" in trailers


async def test_automatic_retries_do_not_multiply_the_wait(engine: FakeEngine, serve: Serve) -> None:
    served = await serve()
    engine.verdict = engine_pb2.FinishedRequest(outcome=engine_pb2.OUTCOME_UNAVAILABLE, message="no executor")
    retrying = json.dumps(
        {
            "methodConfig": [
                {
                    "name": [{}],
                    "retryPolicy": {
                        "maxAttempts": 4,
                        "initialBackoff": "0.01s",
                        "maxBackoff": "0.01s",
                        "backoffMultiplier": 1,
                        "retryableStatusCodes": ["UNAVAILABLE"],
                    },
                }
            ]
        }
    )
    options = [("grpc.service_config", retrying)]
    async with grpc.aio.insecure_channel(f"127.0.0.1:{served.server.port}", options=options) as channel:
        with pytest.raises(grpc.aio.AioRpcError):
            await generation_pb2_grpc.GenerationStub(channel).Generate(ask())
    assert len(engine.submits) == 1
