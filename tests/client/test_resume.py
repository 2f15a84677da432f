"""Streams that break and go on: scripted servers that fail, and what they are asked next."""

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from typing import Unpack

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from google.rpc.error_details_pb2 import RetryInfo

from baton import (
    AsyncClient,
    BatonError,
    Client,
    ConnectFailedError,
    DeadlineExceededError,
    Delta,
    RequestCancelledError,
    RequestFailedError,
    ResumePolicy,
    UnavailableError,
)
from baton.options import GenerateOptions
from baton.stream_log import StreamLog
from baton_protos import generation_pb2 as pb
from tests.client.fake_server import SILENCE, FakeServer, Step, chunk, end, failure, start

GONE = failure(grpc.StatusCode.UNAVAILABLE, "gone")
PUSHED_BACK = failure(grpc.StatusCode.UNAVAILABLE, "waited in vain")._replace(
    trailing_metadata=(("grpc-retry-pushback-ms", "-1"),)
)
EAGER = ResumePolicy(first_wait=0.01, longest_wait=0.02, patience=20.0)

Read = Callable[..., tuple[list[Delta], int]]


def read(targets: list[str], policy: ResumePolicy = EAGER, timeout: float | None = None) -> tuple[list[Delta], int]:
    """The deltas of a stream and how often it was interrupted."""
    with Client(targets, resume=policy) as client, client.stream("hi", seed=7, timeout=timeout) as stream:
        return list(stream), stream.interruptions


def read_async(
    targets: list[str], policy: ResumePolicy = EAGER, timeout: float | None = None
) -> tuple[list[Delta], int]:
    """The same with asyncio."""

    async def run() -> tuple[list[Delta], int]:
        client = AsyncClient(targets, resume=policy)
        async with client, client.stream("hi", seed=7, timeout=timeout) as stream:
            return [delta async for delta in stream], stream.interruptions

    return asyncio.run(run())


@pytest.fixture
def servers() -> Iterator[list[FakeServer]]:
    """Two of them; what they do is up to ``script``."""
    with ExitStack() as stack:
        yield [stack.enter_context(FakeServer()) for _ in range(2)]


@pytest.fixture(params=[read, read_async], ids=["sync", "asyncio"])
def reader(request: pytest.FixtureRequest) -> Read:
    chosen: Read = request.param
    return chosen


def targets(servers: list[FakeServer]) -> list[str]:
    return [server.address for server in servers]


def script(servers: list[FakeServer], *calls: list[Step]) -> None:
    """The n-th call, to whichever server, gets the n-th script; further ones get the last."""
    remaining = list(calls)

    def steps(_: pb.GenerateRequest) -> list[Step]:
        return remaining.pop(0) if len(remaining) > 1 else remaining[0]

    for server in servers:
        server.script = steps


def asked(servers: list[FakeServer]) -> list[pb.GenerateRequest]:
    """All requests, fresh ones first."""
    return sorted((request for server in servers for request in server.requests), key=lambda one: len(one.resume))


FIRST: list[Step] = [start(), chunk(0, [4, 5], "he", 0), chunk(2, [6], "", 2), GONE]
SECOND: list[Step] = [start(), chunk(3, [7], "llo", 2), end(4)]


def test_a_stream_goes_on_elsewhere_with_what_has_come(servers: list[FakeServer], reader: Read) -> None:
    script(servers, FIRST, SECOND)
    deltas, interruptions = reader(targets(servers))
    assert [token for delta in deltas for token in delta.token_ids] == [4, 5, 6, 7]
    assert "".join(delta.text for delta in deltas) == "hello"
    assert interruptions == 1
    assert [len(server.requests) for server in servers] == [1, 1]
    _, again = asked(servers)
    assert (again.request_id, again.sampling.seed, list(again.token_ids.ids)) == ("r1", 7, [1, 2])
    assert again.WhichOneof("prompt") == "token_ids"
    (point,) = again.resume
    assert (point.sample, list(point.token_ids), point.text_offset) == (0, [4, 5, 6], 2)


def test_a_single_scheduler_is_asked_again(servers: list[FakeServer], reader: Read) -> None:
    script(servers, FIRST, [GONE], [failure(grpc.StatusCode.ALREADY_EXISTS, "still there")], SECOND)
    deltas, interruptions = reader(targets(servers)[:1])
    assert "".join(delta.text for delta in deltas) == "hello"
    assert (interruptions, len(servers[0].requests)) == (1, 4)


def test_what_comes_twice_is_told_once(servers: list[FakeServer], reader: Read) -> None:
    repeating = [start(), chunk(0, [4, 5, 6, 7], "hello", 0), end(4)]
    script(servers, FIRST, repeating)
    deltas, _ = reader(targets(servers))
    assert [delta.text for delta in deltas] == ["he", "", "llo"]


def test_what_breaks_after_the_last_message_has_ended(servers: list[FakeServer], reader: Read) -> None:
    script(servers, [start(), chunk(0, [4], "h", 0), end(1, pb.FINISH_REASON_ABORT), GONE])
    deltas, interruptions = reader(targets(servers))
    assert ([delta.text for delta in deltas], interruptions) == (["h"], 0)
    assert sum(len(server.requests) for server in servers) == 1


def test_before_its_start_a_stream_begins_anew(servers: list[FakeServer], reader: Read) -> None:
    script(servers, [GONE], [start(), chunk(0, [4], "h", 0), end(1)])
    deltas, interruptions = reader(targets(servers))
    assert [delta.text for delta in deltas] == ["h"]
    assert interruptions == 0
    assert all(not request.resume for request in asked(servers))


def test_a_stream_that_never_begins_is_given_up(servers: list[FakeServer], reader: Read) -> None:
    script(servers, [GONE])
    with pytest.raises(UnavailableError, match="gone"):
        reader(targets(servers))
    assert 2 <= sum(len(server.requests) for server in servers) <= 8


class _Refused(grpc.RpcError):
    """A call that nobody answered."""

    def trailing_metadata(self) -> None:
        return None


def test_beginning_outlasts_a_channels_pause() -> None:
    """A channel whose server was not there fails calls for up to two seconds, even if the server is back."""
    log, error = StreamLog(pb.GenerateRequest(), ResumePolicy(), 2), ConnectFailedError("refused")
    waits: list[float] = []
    with pytest.raises(ConnectFailedError):
        while True:
            waits.append(log.broken(error, _Refused(), now=sum(waits)))
    assert sum(waits) >= 2.0


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (failure(grpc.StatusCode.INTERNAL, "its logits were not finite"), RequestFailedError),
        (failure(grpc.StatusCode.INVALID_ARGUMENT, "no"), BatonError),
    ],
)
def test_failures_of_the_request_itself_are_final(
    servers: list[FakeServer], reader: Read, status: grpc.Status, kind: type[BatonError]
) -> None:
    script(servers, [*FIRST[:-1], status])
    with pytest.raises(kind):
        reader(targets(servers))
    assert sum(len(server.requests) for server in servers) == 1


def test_patience_ends(servers: list[FakeServer], reader: Read) -> None:
    script(servers, FIRST, [start(), GONE])
    with pytest.raises(UnavailableError, match="gone"):
        reader(targets(servers), ResumePolicy(first_wait=0.01, longest_wait=0.02, patience=0.2))
    assert sum(len(server.requests) for server in servers) > 3


def test_no_patience_means_no_second_call(servers: list[FakeServer], reader: Read) -> None:
    script(servers, FIRST)
    with pytest.raises(UnavailableError, match="gone"):
        reader(targets(servers), ResumePolicy(patience=0.0))
    assert sum(len(server.requests) for server in servers) == 1


def test_the_timeout_covers_all_calls(servers: list[FakeServer], reader: Read) -> None:
    script(servers, FIRST, [start(), SILENCE])
    with pytest.raises(DeadlineExceededError):
        reader(targets(servers), timeout=0.5)


def test_an_overloaded_successor_is_tried_again(servers: list[FakeServer], reader: Read) -> None:
    retry = RetryInfo(retry_delay=Duration(nanos=10_000_000))
    script(servers, FIRST, [failure(grpc.StatusCode.RESOURCE_EXHAUSTED, "full", retry)], SECOND)
    assert reader(targets(servers))[1] == 1


def test_nobody_listens(reader: Read) -> None:
    with pytest.raises(ConnectFailedError):
        reader(["127.0.0.1:9", "127.0.0.1:19"])


def test_closing_ends_a_stream_that_waits_to_go_on(servers: list[FakeServer]) -> None:
    script(servers, FIRST, [start(), GONE])
    patient = ResumePolicy(first_wait=30.0, longest_wait=30.0)
    with Client(targets(servers), resume=patient) as client, client.stream("hi") as stream:
        for _ in range(2):
            next(stream)
        began = time.monotonic()
        threading.Timer(0.3, stream.close).start()
        with pytest.raises((RequestCancelledError, UnavailableError)):
            next(stream)
        assert time.monotonic() - began < 15.0


def test_closing_the_client_ends_its_streams(servers: list[FakeServer]) -> None:
    script(servers, [*FIRST[:-1], SILENCE])
    with Client(targets(servers), resume=EAGER) as client:
        stream = client.stream("hi")
        next(stream)
        client.close()
        with pytest.raises(RequestCancelledError):
            stream.result()
    assert sum(len(server.requests) for server in servers) == 1


def answering(text: str) -> pb.GenerateResponse:
    sample = pb.Sample(text=text, token_ids=[4], finish_reason=pb.FINISH_REASON_STOP)
    return pb.GenerateResponse(samples=[sample], usage=pb.Usage(completion_tokens=1))


def test_a_submitted_request_runs_again_elsewhere(servers: list[FakeServer]) -> None:
    servers[0].answer, servers[1].answer = GONE, answering("whole")
    with Client(targets(servers)) as client:
        done = threading.Event()
        for _ in range(2):  # one begins at each
            pending = client.submit("hi")
            pending.when_done(done.set)
            assert pending.result().text == "whole"
            assert done.wait(5.0)


def test_a_submitted_request_fails_when_all_are_gone(servers: list[FakeServer]) -> None:
    servers[0].answer = servers[1].answer = GONE
    with Client(targets(servers)) as client, pytest.raises(UnavailableError, match="gone"):
        client.submit("hi").result()
    assert all(server.requests for server in servers)


def test_a_cancelled_request_does_not_run_again(servers: list[FakeServer]) -> None:
    servers[0].answer = servers[1].answer = SILENCE
    with Client(targets(servers)) as client:
        pending = client.submit("hi")
        pending.cancel()
        with pytest.raises(RequestCancelledError):
            pending.result()
    assert sum(len(server.requests) for server in servers) <= 1


def test_a_lost_request_does_not_hang_on_a_closed_client(servers: list[FakeServer]) -> None:
    servers[0].answer = GONE
    with Client(targets(servers)) as client:
        _, second = client._endpoints
        second.channel.close()
        done = threading.Event()
        for _ in range(2):  # one begins at each
            with suppress(ValueError):
                pending = client.submit("hi")
                pending.when_done(done.set)
        assert done.wait(20.0)
        with pytest.raises(UnavailableError, match="gone"):
            pending.result()


def test_other_kernels_make_it_best_effort(servers: list[FakeServer]) -> None:
    script(servers, FIRST, [start(model_fingerprint="other"), *SECOND[1:]])
    with Client(targets(servers), resume=EAGER) as client:
        assert not client.stream("hi").result().exact
    script(servers, FIRST, SECOND)
    with Client(targets(servers), resume=EAGER) as client:
        assert client.stream("hi").result().exact


def test_calls_go_to_whoever_is_there(servers: list[FakeServer]) -> None:
    with Client(["127.0.0.1:9", servers[1].address]) as client:
        assert client.model_info().model == "fake"
        client.wait_ready(timeout=5.0)
        client.abort("r1")
    assert servers[1].aborted == ["r1"]


def test_a_wait_in_vain_is_not_repeated(servers: list[FakeServer], reader: Read) -> None:
    script(servers, [start(), PUSHED_BACK])
    with pytest.raises(UnavailableError, match="waited"):
        reader(targets(servers))
    assert sum(len(server.requests) for server in servers) == 1


def test_a_wait_in_vain_does_not_cost_what_has_come(servers: list[FakeServer], reader: Read) -> None:
    script(servers, FIRST, [start(), PUSHED_BACK], SECOND)
    deltas, _ = reader(targets(servers))
    assert "".join(delta.text for delta in deltas) == "hello"


def leave(targets: list[str], **options: Unpack[GenerateOptions]) -> None:
    """Closes a stream after its first delta, or when it has failed."""
    with Client(targets, resume=EAGER) as client, client.stream("hi", **options) as stream, suppress(BatonError):
        next(stream)


def leave_async(targets: list[str], **options: Unpack[GenerateOptions]) -> None:
    """The same with asyncio."""

    async def run() -> None:
        async with AsyncClient(targets, resume=EAGER) as client, client.stream("hi", **options) as stream:
            with suppress(BatonError):
                await anext(stream)

    asyncio.run(run())


@pytest.fixture(params=[leave, leave_async], ids=["sync", "asyncio"])
def leaver(request: pytest.FixtureRequest) -> Callable[..., None]:
    chosen: Callable[..., None] = request.param
    return chosen


def test_closing_a_stream_aborts_what_would_outlive_it(servers: list[FakeServer], leaver: Callable[..., None]) -> None:
    script(servers, [*FIRST[:-1], SILENCE])
    leaver(targets(servers), request_id="r1", resume_window=30)
    assert [server.aborted for server in servers] == [["r1"], ["r1"]]


@pytest.mark.parametrize(
    ("steps", "window"),
    [
        ([*FIRST[:-1], SILENCE], 0),
        ([failure(grpc.StatusCode.ALREADY_EXISTS, "it is another one's")], 30),
        ([start(), failure(grpc.StatusCode.ABORTED, "another call has taken over")], 30),
    ],
    ids=["nothing outlives it", "it never ran", "it is another call's now"],
)
def test_closing_a_stream_aborts_nothing_else(
    servers: list[FakeServer], leaver: Callable[..., None], steps: list[Step], window: float
) -> None:
    script(servers, steps)
    leaver(targets(servers), request_id="r1", resume_window=window)
    assert [server.aborted for server in servers] == [[], []]


def test_a_stream_that_has_ended_is_not_aborted(servers: list[FakeServer]) -> None:
    script(servers, [start(), chunk(0, [4], "h", 0), end(1)])
    with Client(targets(servers)) as client:
        client.stream("hi", request_id="r1", resume_window=30).result()
    assert [server.aborted for server in servers] == [[], []]


def test_closing_the_asyncio_client_ends_a_stream_that_waits_to_go_on(servers: list[FakeServer]) -> None:
    script(servers, [*FIRST[:-1], GONE])

    async def run() -> None:
        client = AsyncClient(targets(servers), resume=ResumePolicy(first_wait=1.0, longest_wait=1.0))
        stream = client.stream("hi")
        for _ in range(2):
            await anext(stream)
        going_on = asyncio.ensure_future(anext(stream))
        while not stream.interruptions:
            await asyncio.sleep(0.01)
        await client.close()
        with pytest.raises(BatonError):
            await going_on

    asyncio.run(run())


def test_a_stream_that_goes_on_from_elsewhere_keeps_what_came_there() -> None:
    request = pb.GenerateRequest(resume=[pb.ResumePoint(sample=0, token_ids=[5, 6], text_offset=2)])
    log = StreamLog(request, EAGER, 1)
    log.add(start())
    log.add(chunk(2, [7], "c", 2))
    (point,) = log.request().resume
    assert (list(point.token_ids), point.text_offset) == ([5, 6, 7], 3)
