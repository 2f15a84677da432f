"""OutputStream and Inbox on their own."""

import asyncio

import grpc
import pytest

from scheduler_service.api.errors import RequestError
from scheduler_service.api.messages import Finish, Outcome, TokenLogprob
from scheduler_service.api.streams import Inbox, News, OutputStream

END = Finish(Outcome.LENGTH, 3)
ERROR = RequestError(grpc.StatusCode.INTERNAL, "", "broken")
NOW = 1.0


async def take(inbox: Inbox) -> News:
    return (await inbox.next()).take()


def pushed(stream: OutputStream, *tokens: int) -> None:
    for token in tokens:
        stream.push(token, NOW)


async def test_takes_everything_at_once() -> None:
    inbox = Inbox()
    stream = OutputStream(1, inbox)
    pushed(stream, *range(5))
    assert (await take(inbox)).token_ids == [0, 1, 2, 3, 4]
    taking = asyncio.ensure_future(take(inbox))
    await asyncio.sleep(0)
    pushed(stream, 5, 6)
    stream.finish(END)
    pushed(stream, 7)
    news = await taking
    assert (news.token_ids, news.finish) == ([5, 6], END)


async def test_streams_take_turns() -> None:
    inbox = Inbox()
    one, two = OutputStream(1, inbox), OutputStream(2, inbox)
    pushed(two, 1)
    pushed(one, 2, 3)
    pushed(two, 4)
    assert await inbox.next() is two and two.take().token_ids == [1, 4]
    pushed(two, 5)
    assert await inbox.next() is one and one.take().token_ids == [2, 3]
    assert await inbox.next() is two and two.take().token_ids == [5]


async def test_first_end_counts() -> None:
    inbox = Inbox()
    stream = OutputStream(1, inbox)
    stream.finish(END)
    stream.fail(ERROR)
    assert (await take(inbox)).finish == END


async def test_tokens_before_the_error() -> None:
    inbox = Inbox()
    stream = OutputStream(1, inbox)
    pushed(stream, 1)
    stream.fail(ERROR)
    stream.finish(END)
    assert (await take(inbox)).token_ids == [1]
    with pytest.raises(RequestError):
        await take(inbox)


async def test_a_patient_reader_sleeps_until_an_end() -> None:
    inbox = Inbox()
    inbox.patient = True
    one, two = OutputStream(1, inbox), OutputStream(2, inbox)
    waiting = asyncio.ensure_future(take(inbox))
    await asyncio.sleep(0)
    pushed(one, 1)
    await asyncio.sleep(0)
    assert not waiting.done()
    two.finish(END)
    assert (await waiting).token_ids == [1]
    assert (await take(inbox)).finish == END


async def test_cancelled_reader_leaves_the_stream_usable() -> None:
    inbox = Inbox()
    stream = OutputStream(1, inbox)
    taking = asyncio.ensure_future(take(inbox))
    await asyncio.sleep(0)
    taking.cancel()
    await asyncio.gather(taking, return_exceptions=True)
    pushed(stream, 1)
    assert (await take(inbox)).token_ids == [1]


async def test_a_closed_inbox_has_nothing_but_its_error() -> None:
    inbox = Inbox()
    pushed(OutputStream(1, inbox), 1)
    inbox.close(ERROR)
    with pytest.raises(RequestError):
        await take(inbox)


async def test_rewind_to_any_point() -> None:
    inbox = Inbox()
    stream = OutputStream(1, inbox, resumed=2, keep=True)
    for token in range(2, 8):
        stream.push(token, NOW, TokenLogprob(float(token), 1, [], []))
        if token == 5:
            await take(inbox)
    had = [100, 101, 2, 3, 4, 5]  # what came before the stream began is the caller's own
    assert not stream.agrees_with([7, 7, 3])
    assert not stream.reaches(1) and not stream.reaches(9)
    for count in range(2, 7):
        assert stream.agrees_with(had[:count]) and stream.reaches(count)
        again = Inbox()
        stream.rewind(count, again)
        news = await take(again)
        assert news.token_ids == list(range(count, 8))
        assert [one.logprob for one in news.logprobs] == news.token_ids


async def test_a_stream_that_ended_can_be_read_again() -> None:
    inbox = Inbox()
    stream = OutputStream(1, inbox, keep=True)
    stream.push_prompt([TokenLogprob(-1.0, 1, [], [])])
    pushed(stream, 1, 2)
    stream.finish(END)
    first = await take(inbox)
    again = Inbox()
    stream.rewind(0, again)
    assert await take(again) == first
    assert first.prompt_logprobs is not None and first.finish == END


async def test_arrivals() -> None:
    stream = OutputStream(1, Inbox(), resumed=3, note_arrivals=True)
    for token, now in enumerate((1.0, 1.0, 2.0)):
        assert stream.push(token, now) == token + 1
    assert stream.arrivals == [(1.0, 5), (2.0, 6)]
    assert stream.first_token_at == 1.0
