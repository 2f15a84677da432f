"""What is accepted at the edge of the limits, and what is refused for other reasons than a limit."""

import asyncio
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from baton_protos import generation_pb2 as pb
from baton_protos.columns import unpack
from scheduler_service.api.errors import RequestError
from scheduler_service.api.generation_wire import decode_request

from .conftest import Serve, until, write_checkpoint
from .fake_engine import FakeEngine
from .violations import chat, ids, output, request, sampling, stop

GOOD = {
    "largest max_tokens": stop(max_tokens=997),
    "14 stop ids besides the checkpoint's two": stop(stop_token_ids=range(10, 24), max_tokens=1),
    "extremes": request(
        sampling=pb.SamplingParams(temperature=100, top_p=1e-6, top_k=512),
        stop=pb.StopConditions(max_tokens=1, ignore_eos=True, stop_token_ids=[511]),
        request_id="ü" * 128,
        model="tiny",
    ),
    "small divisors": request(
        sampling=pb.SamplingParams(temperature=0.0001, repetition_penalty=0.01),
        stop=pb.StopConditions(max_tokens=1),
    ),
    "other extremes": request(
        sampling=pb.SamplingParams(
            temperature=0,
            min_p=1,
            repetition_penalty=10,
            frequency_penalty=-2,
            presence_penalty=2,
            seed=2**64 - 1,
            logit_bias={token_id: 100.0 - token_id % 2 * 200 for token_id in range(512)},
            banned_token_ids=range(1, 512),
            allowed_token_ids=[0, 1],
        ),
        stop=pb.StopConditions(
            max_tokens=2,
            min_tokens=2,
            ignore_eos=True,
            stop_strings=["é" * 256] * 16,
            include_stop=True,
            deadline_unix_ms=2**64 - 1,
        ),
        priority=-1000,
        tenant="x" * 128,
        cache_salt="\0" * 128,
        queue_timeout_ms=86_400_000,
        request_id="a",
        resume_window_ms=600_000,
        output=pb.OutputOptions(logprobs=20, prompt_logprobs=20, logprob_kind=pb.LOGPROB_KIND_PROCESSED, timings=True),
    ),
    "64 samples": request(n=64, stop=pb.StopConditions(max_tokens=1)),
    "almost the whole context": request(token_ids=ids(*[511] * 999)),
    "empty content": request(chat=chat(("user", "")), stop=pb.StopConditions(max_tokens=1)),
}


async def failure(call: Any) -> tuple[grpc.StatusCode, list[str], Any]:
    """Status, fields in BadRequest, and the RetryInfo if any."""
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await call
    status = rpc_status.from_call(error.value)
    fields: list[str] = []
    retry = None
    for detail in status.details if status else ():
        bad, info = error_details_pb2.BadRequest(), error_details_pb2.RetryInfo()
        if detail.Unpack(bad):
            fields += [violation.field for violation in bad.field_violations]
        elif detail.Unpack(info):
            retry = info
    return error.value.code(), fields, retry


@pytest.mark.parametrize("name", GOOD)
async def test_accepted(name: str, engine: FakeEngine, stub: Any) -> None:
    await stub.Generate(GOOD[name])
    assert len(engine.submits) == (GOOD[name].n or 1)


async def test_unknown_model(stub: Any) -> None:
    assert await failure(stub.Generate(request(model="other"))) == (grpc.StatusCode.NOT_FOUND, ["model"], None)


async def test_messages(serve: Serve, tmp_path: Path) -> None:
    echo = "{{ raise_exception(messages[0].content) }}"
    stub = (await serve(model=write_checkpoint(tmp_path, chat_template=echo))).stub
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await stub.Generate(sampling(top_p=2))
    assert error.value.details() == "sampling.top_p: must be a number above 0 and at most 1"
    # Long ones are cut, or the trailers would burst.
    long = request(chat=chat(("user", "日🙂" * 10_000)))
    assert (await failure(stub.Generate(long)))[:2] == (grpc.StatusCode.INVALID_ARGUMENT, ["chat"])


@pytest.mark.parametrize(
    ("message", "field"),
    [
        (pb.GenerateRequest(chat=pb.ChatMessages(messages=[pb.ChatMessage()] * 4097)), "chat"),
        (pb.GenerateRequest(resume=[pb.ResumePoint()] * 65), "resume"),
    ],
    ids=["messages", "points"],
)
def test_too_many_parts_are_not_even_decoded(message: pb.GenerateRequest, field: str) -> None:
    # A million of them, in 2 MB, would stop everybody's streams for seconds.
    with pytest.raises(RequestError) as refused:
        decode_request(message)
    assert refused.value.field == field


async def test_what_is_listed_twice_is_sent_once(engine: FakeEngine, stub: Any) -> None:
    # An executor would end its session over a list that is longer than the vocabulary.
    twice = sampling(allowed_token_ids=[9, 5, 6] * 300, banned_token_ids=[6] * 600)
    twice.stop.max_tokens = 1
    await stub.Generate(twice)
    sent = engine.submits[0].sampling
    assert unpack(sent.allowed_token_ids).tolist() == [9, 5, 6]
    assert unpack(sent.banned_token_ids).tolist() == [6]


async def test_no_executor_ever(engine: FakeEngine, serve: Serve) -> None:
    engine.limits.Clear()
    stub = (await serve(attached=False)).stub
    await until(lambda: engine.peers)
    code, _, retry = await failure(stub.Generate(request()))
    assert code == grpc.StatusCode.UNAVAILABLE and retry.retry_delay.ToMilliseconds() > 0
    # What is wrong with a request does not depend on executors, and must not be tried again.
    assert (await failure(stub.Generate(sampling(top_p=2))))[0] == grpc.StatusCode.INVALID_ARGUMENT


async def test_executors_gone_for_a_while(engine: FakeEngine, stub: Any) -> None:
    await engine.set_limits(ready_executors=0)
    await stub.Generate(stop(max_tokens=3))  # the engine queues it


async def test_bounded_requests(engine: FakeEngine, serve: Serve) -> None:
    stub = (await serve(max_queued_requests=2)).stub
    engine.paused = True
    running = [asyncio.ensure_future(stub.Generate(stop(max_tokens=3))) for _ in range(2)]
    await until(lambda: len(engine.submits) == 2)
    code, _, retry = await failure(stub.Generate(stop(max_tokens=3)))
    assert code == grpc.StatusCode.RESOURCE_EXHAUSTED and retry.retry_delay.ToMilliseconds() > 0
    engine.paused = False
    await asyncio.gather(*running)
    await stub.Generate(stop(max_tokens=3))


async def test_those_that_run_do_not_wait(engine: FakeEngine, serve: Serve) -> None:
    stub = (await serve(max_queued_requests=2)).stub
    await engine.set_limits(max_rows=3)
    await stub.Generate(stop(max_tokens=3))  # its end comes after the limits
    engine.submits.clear()
    engine.paused = True
    taken = [asyncio.ensure_future(stub.Generate(stop(max_tokens=3))) for _ in range(5)]
    await until(lambda: len(engine.submits) == 5)
    assert (await failure(stub.Generate(stop(max_tokens=3))))[0] == grpc.StatusCode.RESOURCE_EXHAUSTED
    engine.paused = False
    await asyncio.gather(*taken)


async def test_without_tokenizer_ids_still_work(serve: Serve, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path)
    (folder / "tokenizer.json").unlink()
    stub = (await serve(model=folder)).stub
    response = await stub.Generate(stop(max_tokens=3))
    assert len(response.samples[0].token_ids) == 3 and not response.samples[0].text
    missing = grpc.StatusCode.FAILED_PRECONDITION
    assert (await failure(stub.Generate(request(text="hi"))))[:2] == (missing, ["text"])
    assert (await failure(stub.Generate(request(chat=chat(("user", "hi"))))))[:2] == (missing, ["chat"])
    assert (await failure(stub.Generate(output(text=True))))[:2] == (missing, ["output.text"])
    assert (await failure(stub.Generate(stop(stop_strings=["x"]))))[:2] == (missing, ["stop.stop_strings"])
    assert (await failure(stub.Tokenize(pb.TokenizeRequest(text="hi"))))[:2] == (missing, ["text"])
    assert (await failure(stub.Detokenize(pb.DetokenizeRequest(token_ids=[5]))))[:2] == (missing, ["token_ids"])


async def test_without_template_text_still_works(serve: Serve, tmp_path: Path) -> None:
    stub = (await serve(model=write_checkpoint(tmp_path, chat_template=None))).stub
    await stub.Generate(request(text="hi", stop=pb.StopConditions(max_tokens=1)))
    code, fields, _ = await failure(stub.Generate(request(chat=chat(("user", "hi")))))
    assert (code, fields) == (grpc.StatusCode.FAILED_PRECONDITION, ["chat"])
    assert not (await stub.GetModelInfo(pb.GetModelInfoRequest())).has_chat_template


@pytest.mark.parametrize("request_ids", [["a"] * 10_001, ["x" * 129]], ids=["too many", "too long"])
async def test_bad_abort(stub: Any, request_ids: list[str]) -> None:
    refused = await failure(stub.Abort(pb.AbortRequest(request_ids=request_ids)))
    assert refused[:2] == (grpc.StatusCode.INVALID_ARGUMENT, ["request_ids"])


async def test_bad_tokenize_and_detokenize(stub: Any) -> None:
    invalid = grpc.StatusCode.INVALID_ARGUMENT
    assert (await failure(stub.Tokenize(pb.TokenizeRequest())))[:2] == (invalid, ["prompt"])
    assert (await failure(stub.Tokenize(pb.TokenizeRequest(text="x" * 5_000_000))))[:2] == (invalid, ["text"])
    assert (await failure(stub.Detokenize(pb.DetokenizeRequest(token_ids=[512]))))[:2] == (invalid, ["token_ids"])
