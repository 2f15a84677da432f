"""Streams that go on: from a caller's resume points, and by taking over a request that outlived its connection."""

import asyncio
import time
from pathlib import Path
from typing import Any

import grpc
import pytest

from baton_protos import engine_pb2
from baton_protos import generation_pb2 as pb
from baton_protos.columns import unpack
from scheduler_service.api.checkpoint import load_checkpoint
from scheduler_service.api.request_key import RequestKey

from .conftest import Serve, until
from .fake_engine import FakeEngine, token_of
from .reading import StreamRead, ask, read, resumed

WINDOW = 60_000


def keeping(**fields: Any) -> pb.GenerateRequest:
    """A request that outlives its connection."""
    return ask(**{"request_id": "kept", "resume_window_ms": WINDOW, **fields})


async def code_of(call: Any) -> grpc.StatusCode:
    with pytest.raises(grpc.aio.AioRpcError) as error:
        async for _ in call:
            pass
    code: grpc.StatusCode = error.value.code()
    return code


@pytest.fixture
def repeating(engine: FakeEngine) -> None:
    """Have tokens depend on their index and the seed alone, so that text prompts and their ids give the same."""
    engine.token = lambda submit, index: (index * 37 + submit.sampling.seed % 1000) % 500 + 3


async def test_resume_at_every_offset(engine: FakeEngine, stub: Any, repeating: None) -> None:
    request = ask(max_tokens=24, stop={"stop_strings": ["\ufffd\ufffd\ufffd\ufffd\ufffd", "no such text"]})
    whole = await read(stub.GenerateStream(request))
    sample = whole.only
    certain = [
        len((await stub.Generate(ask(max_tokens=max(1, n)))).samples[0].text.rstrip("\ufffd")) for n in range(24)
    ]
    for count in range(24):
        reach = certain[count] if count else 0
        for offset in {0, reach // 2, max(0, reach - 12)}:
            point = pb.ResumePoint(sample=0, token_ids=sample.token_ids[:count], text_offset=offset)
            engine.submits.clear()
            rest = await read(stub.GenerateStream(resumed(request, whole.start, point)), (point,))
            assert unpack(engine.submits[0].output_token_ids).tolist() == sample.token_ids[:count]
            assert rest.start.sample_seeds == whole.start.sample_seeds
            assert sample.token_ids[:count] + rest.only.token_ids == sample.token_ids
            assert sample.text[:offset] + rest.only.text == sample.text
            assert rest.only.ended == sample.ended


@pytest.mark.parametrize("stop", ["fox", "🙂 over"])
async def test_resume_at_every_message(engine: FakeEngine, stub: Any, checkpoint: Path, stop: str) -> None:
    tokenizer = load_checkpoint(checkpoint).tokenizer
    assert tokenizer is not None
    ids = tokenizer.encode("the quick brown fox jumps 🙂 over größer dogs", add_special_tokens=False)
    engine.token = lambda submit, index: ids[index] if index < len(ids) else 40
    request = ask(max_tokens=100, stop={"stop_strings": [stop], "include_stop": True}, n=2)
    whole = await read(stub.GenerateStream(request))
    engine.step_seconds = 0.02  # so that every token is a message
    for limit in range(1, 2 * len(ids), 3):
        call = stub.GenerateStream(request)
        begun = await read(call, limit=limit)
        call.cancel()
        points = tuple(begun.points())
        engine.step_seconds = 0.002
        rest = await read(stub.GenerateStream(resumed(request, whole.start, *points)), points)
        for first, second, all_of_it in zip(begun.samples, rest.samples, whole.samples, strict=True):
            assert first.token_ids + second.token_ids == all_of_it.token_ids
            assert first.text + second.text == all_of_it.text
            assert second.ended.stop_string == stop
        engine.step_seconds = 0.02


async def test_what_ended_already_ends_at_once(engine: FakeEngine, stub: Any, repeating: None) -> None:
    for stop in ({"stop_token_ids": [121]}, {"max_tokens": 4}):
        request = ask(max_tokens=stop.get("max_tokens", 20), seed=7, stop=stop)
        whole = await read(stub.GenerateStream(request))
        engine.submits.clear()
        (point,) = whole.points()
        rest = await read(stub.GenerateStream(resumed(request, whole.start, point)), (point,))
        assert not engine.submits
        assert rest.only.token_ids == [] and rest.only.text == ""
        ended, again = whole.only.ended, rest.only.ended
        assert again.finish_reason == ended.finish_reason and again.stop_token_id == ended.stop_token_id
        assert again.usage.completion_tokens == ended.usage.completion_tokens


async def test_min_tokens_hold_in_what_is_resumed(engine: FakeEngine, stub: Any) -> None:
    engine.token = lambda submit, index: 11
    request = ask(stop={"stop_token_ids": [11], "min_tokens": 5}, max_tokens=20)
    point = pb.ResumePoint(sample=0, token_ids=[11] * 3)
    start = pb.StreamStart(seed=7, prompt_token_ids=[5, 6])
    rest = await read(stub.GenerateStream(resumed(request, start, point)), (point,))
    assert rest.only.token_ids == [11] * 3  # the sixth may stop


async def test_samples_resume_each_at_its_own_point(engine: FakeEngine, stub: Any, repeating: None) -> None:
    request = ask(n=3)
    whole = await read(stub.GenerateStream(request))
    points = (
        pb.ResumePoint(sample=2, token_ids=whole.samples[2].token_ids, text_offset=len(whole.samples[2].text)),
        pb.ResumePoint(sample=0, token_ids=whole.samples[0].token_ids[:7]),
    )
    engine.submits.clear()
    rest = await read(stub.GenerateStream(resumed(request, whole.start, *points)), points)
    assert len(engine.submits) == 2
    assert rest.samples[0].token_ids == whole.samples[0].token_ids[7:] and rest.samples[0].text == whole.samples[0].text
    assert rest.samples[1].token_ids == whole.samples[1].token_ids
    assert rest.samples[2].token_ids == [] and rest.samples[2].text == ""
    assert rest.samples[2].ended.finish_reason == whole.samples[2].ended.finish_reason
    total = sum(sample.ended.usage.completion_tokens for sample in rest.samples)
    assert total == 60


async def test_a_unary_call_resumes_too(stub: Any, repeating: None) -> None:
    request = ask()
    whole = await read(stub.GenerateStream(request))
    point = pb.ResumePoint(sample=0, token_ids=whole.only.token_ids[:9], text_offset=2)
    (sample,) = (await stub.Generate(resumed(request, whole.start, point))).samples
    assert list(sample.token_ids) == whole.only.token_ids[9:] and sample.text == whole.only.text[2:]


async def break_off(stub: Any, request: pb.GenerateRequest, limit: int) -> StreamRead:
    call = stub.GenerateStream(request)
    begun = await read(call, limit=limit)
    call.cancel()
    return begun


async def test_a_retry_takes_the_stream_over(engine: FakeEngine, stub: Any) -> None:
    output = pb.OutputOptions(logprobs=1, prompt_logprobs=0)
    whole = await read(stub.GenerateStream(ask(max_tokens=60, output=output)))
    engine.submits.clear()
    request = keeping(max_tokens=60, output=output)
    begun = await break_off(stub, request, 5)
    # The same request again: everything from the beginning.
    again = await break_off(stub, request, 8)
    assert again.start == begun.start
    # In the words of its StreamStart, from what the caller has.
    points = tuple(again.points())
    rest = await read(stub.GenerateStream(resumed(request, begun.start, *points)), points)
    assert len(engine.submits) == 1 and not engine.aborted
    assert again.only.token_ids + rest.only.token_ids == whole.only.token_ids
    assert again.only.text + rest.only.text == whole.only.text
    assert again.only.logprobs + rest.only.logprobs == whole.only.logprobs
    assert rest.only.ended == whole.only.ended
    assert again.prompt_logprobs == whole.prompt_logprobs


async def test_a_request_goes_on_while_nobody_reads_it(engine: FakeEngine, stub: Any) -> None:
    request = keeping(n=2, max_tokens=50)
    whole = await read(stub.GenerateStream(ask(n=2, max_tokens=50)))
    engine.submits.clear()
    await break_off(stub, request, 4)
    await until(lambda: not engine.running)
    response = await stub.Generate(request)
    assert [list(one.token_ids) for one in response.samples] == [sample.token_ids for sample in whole.samples]
    assert [one.text for one in response.samples] == [sample.text for sample in whole.samples]
    assert len(engine.submits) == 2 and not engine.aborted
    # Whoever has got everything is done: the name is free again.
    await stub.Generate(request)
    assert len(engine.submits) == 4


async def test_a_request_that_is_held_goes_on_for_a_unary_retry(engine: FakeEngine, serve: Serve) -> None:
    stub = (await serve(unread_window=50)).stub
    request = keeping(max_tokens=300)
    await break_off(stub, request, 4)
    await until(lambda: engine.holds)
    async with asyncio.timeout(20):
        response = await stub.Generate(request)
    assert len(response.samples[0].token_ids) == 300


async def test_the_window_closes(engine: FakeEngine, stub: Any) -> None:
    await break_off(stub, keeping(max_tokens=900, resume_window_ms=150), 3)
    await until(lambda: engine.aborted == [engine.handle_of(0)])
    await break_off(stub, keeping(max_tokens=900), 3)
    assert len(engine.submits) == 2


async def test_without_a_window_a_lost_request_ends_at_once(engine: FakeEngine, stub: Any) -> None:
    await break_off(stub, ask(max_tokens=900, request_id="a"), 3)
    await until(lambda: engine.aborted == [engine.handle_of(0)])


async def test_a_retry_does_not_wait_for_the_old_call_to_break(engine: FakeEngine, serve: Serve) -> None:
    served = await serve()
    engine.step_seconds = 0.01
    request = keeping(max_tokens=100)
    old = served.stub.GenerateStream(request)
    await read(old, limit=4)
    new = asyncio.ensure_future(read(served.stub.GenerateStream(request)))
    assert await code_of(old) == grpc.StatusCode.ABORTED
    assert len((await new).only.token_ids) == 100
    assert len(engine.submits) == 1 and not engine.aborted


async def test_of_several_retries_one_gets_everything(engine: FakeEngine, stub: Any) -> None:
    engine.step_seconds = 0.01
    request = keeping(max_tokens=100, text="the quick brown fox " * 200)  # long enough to be tokenised elsewhere
    await break_off(stub, request, 3)
    calls = [asyncio.ensure_future(read(stub.GenerateStream(request))) for _ in range(5)]
    results = await asyncio.gather(*calls, return_exceptions=True)
    whole = [result for result in results if isinstance(result, StreamRead)]
    failed = [result for result in results if isinstance(result, grpc.aio.AioRpcError)]
    assert len(whole) == 1 and len(whole[0].only.token_ids) == 100
    assert [error.code() for error in failed] == [grpc.StatusCode.ABORTED] * 4
    assert len(engine.submits) == 1


async def test_a_retry_that_was_overtaken_does_not_take_the_stream_back(
    engine: FakeEngine, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    served = await serve()
    engine.step_seconds = 0.01
    request = keeping(max_tokens=100)
    await break_off(served.stub, request, 3)
    intake, may_go_on = served.server._intake, asyncio.Event()
    admit = intake._admit

    async def dawdle(request: Any) -> Any:
        monkeypatch.undo()
        await may_go_on.wait()
        return await admit(request)

    monkeypatch.setattr(intake, "_admit", dawdle)
    slow = asyncio.ensure_future(code_of(served.stub.GenerateStream(request)))
    await until(lambda: intake._admit == admit)
    fast = served.stub.GenerateStream(request)
    await read(fast, limit=2)
    may_go_on.set()
    assert await slow == grpc.StatusCode.ABORTED
    async for message in fast:
        if message.WhichOneof("event") == "end":
            assert message.end.finish_reason == pb.FINISH_REASON_LENGTH
    assert len(engine.submits) == 1 and not engine.aborted


async def test_long_logs_resume_beside_other_requests(engine: FakeEngine, stub: Any) -> None:
    await engine.set_limits(max_total_tokens=1_000_000)
    points = [pb.ResumePoint(sample=index, token_ids=[40] * 50_000) for index in range(8)]
    request = ask(n=8, max_tokens=50_001, stop={"stop_strings": ["none of it"]}, resume=points)
    neighbour = asyncio.ensure_future(stub.Generate(ask(max_tokens=50)))
    stream = await read(stub.GenerateStream(request), tuple(points))
    assert [len(sample.token_ids) for sample in stream.samples] == [1] * 8
    assert len((await neighbour).samples[0].token_ids) == 50


@pytest.mark.parametrize(
    "change",
    [
        {"max_tokens": 61},
        {"text": "something else"},
        {"seed": 8},
        {"n": 2},
        {"stop": {"stop_strings": ["x"]}},
        {"output": pb.OutputOptions(logprobs=1)},
        {"cache_salt": "other"},
    ],
    ids=lambda change: next(iter(change)),
)
async def test_another_request_of_the_same_name_is_refused(
    engine: FakeEngine, stub: Any, change: dict[str, Any]
) -> None:
    await break_off(stub, keeping(max_tokens=60), 3)
    assert await code_of(stub.GenerateStream(keeping(**{"max_tokens": 60, **change}))) == grpc.StatusCode.ALREADY_EXISTS
    assert len((await stub.Generate(keeping(max_tokens=60))).samples[0].token_ids) == 60
    assert len(engine.submits) == 1


async def test_a_retry_that_claims_what_was_never_sent_is_refused(engine: FakeEngine, stub: Any) -> None:
    def token(submit: engine_pb2.Submit, index: int) -> int:
        engine.paused |= index == 20
        return token_of(submit, index)

    engine.token = token  # however late the reader is, it has not got all 60
    request = keeping(max_tokens=60)
    begun = await break_off(stub, request, 5)
    await until(lambda: engine.paused)
    ids = begun.only.token_ids
    for wrong in ([*ids[:-1], (ids[-1] + 1) % 512], [*ids, *range(60 - len(ids))]):
        point = pb.ResumePoint(sample=0, token_ids=wrong)
        call = stub.GenerateStream(resumed(request, begun.start, point))
        assert await code_of(call) == grpc.StatusCode.INVALID_ARGUMENT
    point = pb.ResumePoint(sample=0, token_ids=ids, text_offset=1000)
    call = stub.GenerateStream(resumed(request, begun.start, point))
    assert await code_of(call) == grpc.StatusCode.INVALID_ARGUMENT
    engine.paused = False
    assert len((await stub.Generate(request)).samples[0].token_ids) == 60
    assert len(engine.submits) == 1


async def test_a_drawn_seed_is_the_same_request_with_or_without_it(engine: FakeEngine, stub: Any) -> None:
    request = keeping(max_tokens=60, seed=None)
    begun = await break_off(stub, request, 4)
    again = await break_off(stub, request, 4)
    assert again.start.seed == begun.start.seed == engine.submits[0].sampling.seed
    (point,) = again.points()
    await read(stub.GenerateStream(resumed(request, again.start, point)), (point,))
    assert len(engine.submits) == 1


async def test_a_held_request_can_be_aborted(engine: FakeEngine, stub: Any) -> None:
    await break_off(stub, keeping(max_tokens=900), 3)
    await stub.Abort(pb.AbortRequest(request_ids=["kept"]))
    await until(lambda: engine.aborted == [engine.handle_of(0)])


async def test_a_call_whose_own_deadline_passes_keeps_nothing(engine: FakeEngine, stub: Any) -> None:
    call = stub.GenerateStream(keeping(max_tokens=900), timeout=0.3)
    assert await code_of(call) == grpc.StatusCode.DEADLINE_EXCEEDED
    await until(lambda: engine.aborted == [engine.handle_of(0)])


async def test_a_retry_at_another_process_goes_on_from_the_callers_points(engine: FakeEngine, serve: Serve) -> None:
    one, two = await serve(index=0), await serve(index=1)
    engine.token = lambda submit, index: (index * 37) % 500 + 3
    request = keeping(max_tokens=200)
    begun = await break_off(one.stub, request, 5)
    points = tuple(begun.points())
    rest = await read(two.stub.GenerateStream(resumed(request, begun.start, *points)), points)
    assert len(begun.only.token_ids + rest.only.token_ids) == 200
    assert engine.aborted == [engine.submits[0].handle]
    assert unpack(engine.submits[1].output_token_ids).tolist() == begun.only.token_ids


@pytest.mark.parametrize("is_stream", [True, False])
async def test_who_still_reads_what_another_process_took_over_is_told(
    engine: FakeEngine, serve: Serve, repeating: None, is_stream: bool
) -> None:
    """As if the same process had taken it over."""
    one, two = await serve(index=0), await serve(index=1)
    engine.step_seconds = 0.01
    request = keeping(max_tokens=100)
    old = one.stub.GenerateStream(request) if is_stream else one.stub.Generate(request)
    await until(lambda: engine.submits)
    whole = await read(two.stub.GenerateStream(request))
    assert len(whole.only.token_ids) == 100
    with pytest.raises(grpc.aio.AioRpcError) as error:
        _ = [message async for message in old] if is_stream else await old
    assert error.value.code() == grpc.StatusCode.ABORTED
    assert set(engine.aborted) == {engine.submits[0].handle}
    await until(lambda: not one.server._intake.num_live)


async def test_an_abort_for_an_earlier_call_than_the_readers_is_ignored(engine: FakeEngine, serve: Serve) -> None:
    """Of a call that another process took over before this one came: it may be long on its way."""
    served = await serve()
    request = keeping(max_tokens=100)
    before = time.monotonic_ns()
    await break_off(served.stub, request, 4)
    call = served.stub.GenerateStream(request)
    await read(call, limit=2)
    late = engine_pb2.ForwardAbort(request_ids=["\0kept"], taken_over_at_ns=before)
    await engine.send(engine.peers[0], engine_pb2.FromEngine(forward_abort=late))
    async for message in call:
        if message.WhichOneof("event") == "end":
            assert message.end.finish_reason == pb.FINISH_REASON_LENGTH
    assert len(engine.submits) == 1 and not engine.aborted


async def test_a_retry_does_not_get_the_end_of_what_was_taken_over_elsewhere(engine: FakeEngine, serve: Serve) -> None:
    """It comes when the old call has not left yet, which another process has taken over."""
    served = await serve()
    old = served.stub.GenerateStream(keeping(max_tokens=900))
    await read(old, limit=4)
    requests, key, now = served.server._intake._requests, RequestKey("", "kept"), time.monotonic()
    live = requests.find(key)
    assert live is not None and live.validated is not None
    requests.supersede([key], now)
    assert requests.take_over(live, live.validated, now) is None
    assert requests.find(key) is None
    assert await code_of(old) == grpc.StatusCode.ABORTED
    await until(lambda: set(engine.aborted) == {engine.handle_of(0)})


@pytest.mark.parametrize("has_left", [True, False])
async def test_a_copy_that_lags_behind_its_caller_gives_way(
    engine: FakeEngine, serve: Serve, repeating: None, has_left: bool
) -> None:
    """The caller was served by another process meanwhile, and that one's word has not come yet."""
    served = await serve()
    request = keeping(max_tokens=60)
    whole = await read(served.stub.GenerateStream(ask(max_tokens=60)))
    engine.submits.clear()
    engine.step_seconds = 0.05
    old = served.stub.GenerateStream(request)
    begun = await read(old, limit=3)
    engine.paused = True
    if has_left:
        old.cancel()
    point = pb.ResumePoint(sample=0, token_ids=whole.only.token_ids[:40])
    new = served.stub.GenerateStream(resumed(request, begun.start, point))
    await until(lambda: len(engine.submits) == 2)
    engine.paused = False
    rest = await read(new, (point,))
    assert rest.only.token_ids == whole.only.token_ids[40:]
    assert engine.aborted == [engine.submits[0].handle]
    assert unpack(engine.submits[1].output_token_ids).tolist() == whole.only.token_ids[:40]
    if not has_left:
        assert await code_of(old) == grpc.StatusCode.ABORTED


async def test_a_retry_ends_what_other_processes_still_have(engine: FakeEngine, serve: Serve, repeating: None) -> None:
    """Taking over a request here says so to the others: they may have served it in between."""
    one, two = await serve(index=0), await serve(index=1)
    request = keeping(max_tokens=900)
    begun = await break_off(one.stub, request, 4)
    live = one.server._intake._requests.find(RequestKey("", "kept"))
    assert live is not None
    two.server._intake._requests.open(RequestKey("", "kept"), live.call_arrived_at)
    points = tuple(begun.points())
    await read(one.stub.GenerateStream(resumed(request, begun.start, *points)), points, limit=2)
    other = two.server._intake._requests.find(RequestKey("", "kept"))
    assert other is not None
    await until(lambda: other.is_superseded)
    assert not engine.aborted


async def test_draining_ends_what_nobody_reads(engine: FakeEngine, serve: Serve) -> None:
    served = await serve(shutdown_grace=30.0)
    await break_off(served.stub, keeping(max_tokens=900), 3)
    async with asyncio.timeout(10):
        await served.server.stop()
    await until(lambda: engine.aborted == [engine.handle_of(0)])
