"""OutputStream on its own."""

import asyncio

import grpc
import pytest

from scheduler_service.api.errors import RequestError
from scheduler_service.api.messages import Finish, Outcome
from scheduler_service.api.streams import OutputStream

END = Finish(Outcome.LENGTH, 3)
ERROR = RequestError(grpc.StatusCode.INTERNAL, "", "broken")


async def test_takes_everything_at_once() -> None:
    stream = OutputStream(1)
    for token in range(5):
        stream.push(token)
    assert await stream.take() == ([0, 1, 2, 3, 4], None)
    taking = asyncio.ensure_future(stream.take())
    await asyncio.sleep(0)
    stream.push(5)
    stream.push(6)
    stream.finish(END)
    stream.push(7)
    assert await taking == ([5, 6], END)


async def test_first_end_counts() -> None:
    stream = OutputStream(1)
    stream.finish(END)
    stream.fail(ERROR)
    assert await stream.take() == ([], END)


async def test_tokens_before_the_error() -> None:
    stream = OutputStream(1)
    stream.push(1)
    stream.fail(ERROR)
    stream.finish(END)
    assert await stream.take() == ([1], None)
    with pytest.raises(RequestError):
        await stream.take()


async def test_waiting_for_the_end_sleeps_through_tokens() -> None:
    stream = OutputStream(1)
    waiting = asyncio.ensure_future(stream.wait_end())
    await asyncio.sleep(0)
    stream.push(1)
    await asyncio.sleep(0)
    assert not waiting.done()
    stream.finish(END)
    await waiting
    assert await stream.take() == ([1], END)


async def test_cancelled_reader_leaves_the_stream_usable() -> None:
    stream = OutputStream(1)
    taking = asyncio.ensure_future(stream.take())
    await asyncio.sleep(0)
    taking.cancel()
    await asyncio.gather(taking, return_exceptions=True)
    stream.push(1)
    assert await stream.take() == ([1], None)
