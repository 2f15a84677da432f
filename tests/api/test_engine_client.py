"""EngineClient and PromptPool on their own."""

import asyncio
import threading
import time

import grpc
import pytest

from baton_protos import engine_pb2 as pb
from scheduler_service.api.engine_client import EngineClient, EngineListener
from scheduler_service.api.errors import RequestError
from scheduler_service.api.messages import EngineLimits
from scheduler_service.api.prompts import PromptPool

from .conftest import until
from .fake_engine import FakeEngine


async def test_attaches_until_answered(engine: FakeEngine) -> None:
    engine.silent = True
    seen: list[EngineLimits] = []
    client = EngineClient(engine.endpoint, 3)
    client.start(EngineListener(limits=seen.append, forward_abort=lambda message: None))
    await until(lambda: engine.peers == [client.routing_id])
    assert client.routing_id.startswith(b"api-3-")
    engine.peers.clear()
    engine.silent = False
    await until(lambda: client.limits.ready_executors == 1)
    await asyncio.sleep(0.6)  # a heartbeat: nothing new
    assert seen == [client.limits]
    client.close()


async def test_a_process_gets_nothing_of_its_predecessor(engine: FakeEngine) -> None:
    """The engine may not have noticed yet that it is another one, with requests of the same handles."""
    seen: list[EngineLimits] = []
    first, second = (EngineClient(engine.endpoint, 0) for _ in range(2))
    first.start(EngineListener(limits=lambda limits: None, forward_abort=lambda message: None))
    await until(lambda: bool(engine.peers))
    first.close()
    second.start(EngineListener(limits=seen.append, forward_abort=lambda message: None))
    await until(lambda: bool(seen))
    await engine.send(engine.peers[0], pb.FromEngine(limits=pb.Limits(ready_executors=7)))
    await asyncio.sleep(0.2)
    assert [limits.ready_executors for limits in seen] == [1]
    second.close()


async def test_own_stall_is_not_the_engines(engine: FakeEngine) -> None:
    client = EngineClient(engine.endpoint, 0, patience=1.0)
    client.start(EngineListener(limits=lambda limits: None, forward_abort=lambda message: None))
    await until(lambda: client.limits.ready_executors == 1)
    time.sleep(2.0)
    await asyncio.sleep(0.3)
    assert not client.lost.done()
    engine.silent = True
    await asyncio.wait_for(client.lost, 3)
    with pytest.raises(RequestError) as error:
        await client.cluster_status(0.1)
    assert error.value.status == grpc.StatusCode.UNAVAILABLE
    client.close()


async def test_prompt_pool_is_bounded() -> None:
    pool = PromptPool(threads=1, max_pending_bytes=10_000)
    release = threading.Event()
    busy = asyncio.ensure_future(pool.run(6000, release.wait))
    waiting = asyncio.ensure_future(pool.run(4000, lambda: 1))
    await asyncio.sleep(0)
    assert await pool.run(100, lambda: "inline") == "inline"
    with pytest.raises(RequestError) as error:
        await pool.run(3000, lambda: 2)
    assert error.value.status == grpc.StatusCode.RESOURCE_EXHAUSTED
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    release.set()
    assert await busy
    assert await pool.run(10_000, lambda: 3) == 3
    pool.close()
