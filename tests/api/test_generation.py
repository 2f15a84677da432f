"""Streams and unary calls, against a fake engine."""

import asyncio
import json
from pathlib import Path
from typing import Any

import grpc
import pytest

from baton_protos import engine_pb2
from baton_protos import generation_pb2 as pb
from baton_protos.columns import FLOAT32, unpack
from scheduler_service.api import intake
from scheduler_service.api.checkpoint import load_checkpoint

from .conftest import Serve, until, write_checkpoint
from .fake_engine import VOCAB_SIZE, FakeEngine, token_of


def ask(
    text: str = "def add(a, b):", max_tokens: int | None = 20, seed: int | None = 7, **fields: Any
) -> pb.GenerateRequest:
    stop = pb.StopConditions(max_tokens=max_tokens, ignore_eos=True)
    return pb.GenerateRequest(text=text, sampling=pb.SamplingParams(seed=seed), stop=stop, **fields)


async def read(call: Any) -> tuple[pb.StreamStart, list[pb.StreamChunk], pb.StreamEnd]:
    messages = [message async for message in call]
    assert [m.WhichOneof("event") for m in messages] == ["start", *["chunk"] * (len(messages) - 2), "end"]
    return messages[0].start, [message.chunk for message in messages[1:-1]], messages[-1].end


def gap_free(chunks: list[pb.StreamChunk]) -> tuple[list[int], str]:
    """Ids and text of a stream, whose indices and offsets must be exact."""
    ids: list[int] = []
    text = ""
    for chunk in chunks:
        assert chunk.token_index == len(ids) or not chunk.token_ids
        assert chunk.text_offset == len(text)
        ids += chunk.token_ids
        text += chunk.text
    return ids, text


async def test_stream(engine: FakeEngine, stub: Any, checkpoint: Path) -> None:
    start, chunks, end = await read(stub.GenerateStream(ask(request_id="mine")))
    tokenizer = load_checkpoint(checkpoint).tokenizer
    assert tokenizer is not None
    prompt = tokenizer.encode("def add(a, b):", add_special_tokens=True)
    assert (start.request_id, start.seed, start.model_fingerprint) == ("mine", 7, "f00d")
    assert list(start.prompt_token_ids) == prompt and start.prompt_tokens == len(prompt)
    ids, text = gap_free(chunks)
    assert ids == [token_of(engine.submits[0], index) for index in range(20)]
    assert text == tokenizer.decode(ids, skip_special_tokens=True)
    assert end.finish_reason == pb.FINISH_REASON_LENGTH
    assert end.usage == pb.Usage(prompt_tokens=len(prompt), cached_tokens=2, completion_tokens=20)


async def test_unary_equals_stream(stub: Any) -> None:
    response = await stub.Generate(ask())
    start, chunks, end = await read(stub.GenerateStream(ask()))
    ids, text = gap_free(chunks)
    (sample,) = response.samples
    assert (list(sample.token_ids), sample.text, sample.finish_reason) == (ids, text, end.finish_reason)
    assert response.usage == end.usage and response.prompt_token_ids == start.prompt_token_ids
    assert response.seed == 7 and response.request_id.startswith("req-")


async def test_submission_carries_everything(engine: FakeEngine, stub: Any) -> None:
    sampling = pb.SamplingParams(
        temperature=0.5,
        top_k=9,
        top_p=0.25,
        min_p=0.125,
        repetition_penalty=1.5,
        frequency_penalty=-0.5,
        presence_penalty=2.0,
        seed=2**64 - 1,
        logit_bias={7: -100.0},
        allowed_token_ids=[7, 8, 9, 2],
        banned_token_ids=[8],
    )
    stop = pb.StopConditions(max_tokens=3, stop_token_ids=[11, 2], min_tokens=1)
    output = pb.OutputOptions(logprobs=4, prompt_logprobs=0, logprob_kind=pb.LOGPROB_KIND_PROCESSED)
    await stub.Generate(
        pb.GenerateRequest(
            token_ids=pb.TokenIds(ids=[5, 6]),
            sampling=sampling,
            stop=stop,
            output=output,
            priority=-3,
            queue_timeout_ms=77,
            cache_salt="salt",
            tenant="us",
        )
    )
    submit = engine.submits[0]
    assert unpack(submit.prompt_token_ids).tolist() == [5, 6]
    assert (submit.max_tokens, submit.priority, submit.queue_timeout_ms) == (3, -3, 77)
    sent = submit.sampling
    assert unpack(sent.stop_token_ids).tolist() == [2, 0, 11]  # the checkpoint's, then the caller's
    for name in (
        "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "frequency_penalty", "presence_penalty", "seed"
    ):  # fmt: skip
        assert getattr(sent, name) == getattr(sampling, name)
    assert (unpack(sent.bias_token_ids).tolist(), unpack(sent.bias_values, FLOAT32).tolist()) == ([7], [-100.0])
    assert unpack(sent.allowed_token_ids).tolist() == [7, 8, 9, 2] and unpack(sent.banned_token_ids).tolist() == [8]
    assert (sent.min_tokens, sent.num_logprobs, sent.processed_logprobs) == (1, 4, True)
    assert sent.HasField("num_prompt_logprobs") and sent.num_prompt_logprobs == 0
    assert len(submit.cache_salt) == 32


async def test_cache_salts_differ_by_tenant_and_salt(engine: FakeEngine, stub: Any) -> None:
    names = [("", ""), ("a", ""), ("", "a"), ("a", "b"), ("ab", ""), ("", "ab"), ("a", "b")]
    for tenant, salt in names:
        await stub.Generate(ask(max_tokens=1, tenant=tenant, cache_salt=salt))
    salts = [submit.cache_salt for submit in engine.submits]
    assert salts[0] == b"" and {len(salt) for salt in salts[1:]} == {32}
    assert len(set(salts)) == len(set(names)) == len(names) - 1 and salts[3] == salts[6]


async def test_defaults(engine: FakeEngine, stub: Any) -> None:
    engine.token = lambda submit, index: 2 if index == 30 else 40
    response = await stub.Generate(pb.GenerateRequest(token_ids=pb.TokenIds(ids=[5, 6])))
    submit = engine.submits[0]
    sent = submit.sampling
    assert (sent.temperature, sent.top_k, sent.top_p, sent.repetition_penalty, submit.max_tokens) == (1, 0, 1, 1, 998)
    assert not sent.HasField("num_logprobs") and not sent.HasField("num_prompt_logprobs")
    assert response.seed == sent.seed
    assert response.samples[0].finish_reason == pb.FINISH_REASON_STOP
    assert response.samples[0].token_ids[-1] == 2 and "<|im_end|>" not in response.samples[0].text
    again = await stub.Generate(pb.GenerateRequest(token_ids=pb.TokenIds(ids=[5, 6])))
    assert again.seed != response.seed and again.request_id != response.request_id


async def test_output_options(stub: Any) -> None:
    output = pb.OutputOptions(text=False, prompt_token_ids=False)
    response = await stub.Generate(ask(output=output))
    assert not response.samples[0].text and not response.prompt_token_ids
    start, chunks, _ = await read(stub.GenerateStream(ask(output=output)))
    assert not start.prompt_token_ids and start.prompt_tokens > 0
    assert not any(chunk.text for chunk in chunks)


async def test_special_tokens_in_text(engine: FakeEngine, stub: Any) -> None:
    engine.token = lambda submit, index: 1
    shown = await stub.Generate(ask(max_tokens=2, output=pb.OutputOptions(skip_special_tokens=False)))
    assert shown.samples[0].text == "<|im_start|>" * 2
    assert (await stub.Generate(ask(max_tokens=2))).samples[0].text == ""


async def test_gathered_tokens_come_as_one_message(engine: FakeEngine, stub: Any) -> None:
    engine.frames_per_step = 400
    _, chunks, _ = await read(stub.GenerateStream(ask(max_tokens=400)))
    ids, _ = gap_free(chunks)
    assert len(ids) == 400
    assert len(chunks) < 100


async def test_cancel_aborts_at_once(engine: FakeEngine, stub: Any) -> None:
    call = stub.GenerateStream(ask(max_tokens=900))
    await call.read()
    await call.read()
    call.cancel()
    await until(lambda: engine.aborted == [engine.handle_of(0)])
    unary = stub.Generate(ask(max_tokens=900))
    await until(lambda: len(engine.submits) == 2)
    unary.cancel()
    await until(lambda: engine.aborted[1:] == [engine.handle_of(1)])


async def test_cancel_and_deadline_while_queued(engine: FakeEngine, stub: Any) -> None:
    engine.paused = True
    with pytest.raises(grpc.aio.AioRpcError) as late:
        await stub.Generate(ask(), timeout=0.2)
    assert late.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    call = stub.GenerateStream(ask())
    await call.read()
    call.cancel()
    await until(lambda: engine.aborted == [submit.handle for submit in engine.submits])
    assert len(engine.aborted) == 2


async def test_cancel_while_tokenising_submits_nothing(engine: FakeEngine, stub: Any) -> None:
    call = stub.Generate(ask(text="the quick brown fox " * 100_000))
    await asyncio.sleep(0.05)
    call.cancel()
    await stub.Generate(ask())
    assert len(engine.submits) == 1


async def test_abort_by_name(engine: FakeEngine, stub: Any) -> None:
    call = stub.GenerateStream(ask(max_tokens=900, request_id="a"))
    await call.read()
    await call.read()
    await stub.Abort(pb.AbortRequest(request_ids=["a", "nobody"]))
    last = None
    while (message := await call.read()) is not grpc.aio.EOF:
        last = message
    assert last is not None and last.end.finish_reason == pb.FINISH_REASON_ABORT
    assert engine.aborted == [engine.submits[0].handle]


async def test_abort_while_tokenising(engine: FakeEngine, stub: Any) -> None:
    await engine.set_limits(max_total_tokens=10_000_000)
    running = asyncio.ensure_future(stub.Generate(ask(text="the quick brown fox " * 100_000, request_id="a")))
    await asyncio.sleep(0.05)
    await stub.Abort(pb.AbortRequest(request_ids=["a"]))
    (sample,) = (await running).samples
    assert (sample.finish_reason, list(sample.token_ids)) == (pb.FINISH_REASON_ABORT, [])
    assert not engine.submits


async def test_abort_reaches_other_processes(engine: FakeEngine, serve: Serve) -> None:
    one, two = await serve(index=0), await serve(index=1)
    running = asyncio.ensure_future(one.stub.Generate(ask(max_tokens=900, request_id="a")))
    await until(lambda: engine.submits)
    await two.stub.Abort(pb.AbortRequest(request_ids=["a"]))
    response = await running
    assert response.samples[0].finish_reason == pb.FINISH_REASON_ABORT
    assert response.usage.completion_tokens == len(response.samples[0].token_ids)


async def test_name_in_use(engine: FakeEngine, stub: Any) -> None:
    engine.paused = True
    running = asyncio.ensure_future(stub.Generate(ask(request_id="a")))
    await until(lambda: engine.submits)
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await stub.Generate(ask(request_id="a"))
    assert error.value.code() == grpc.StatusCode.ALREADY_EXISTS
    engine.paused = False
    await running
    await stub.Generate(ask(request_id="a"))


async def test_many_streams(engine: FakeEngine, stub: Any) -> None:
    calls = [read(stub.GenerateStream(ask(seed=seed))) for seed in range(500)]
    for seed, (start, chunks, _) in enumerate(await asyncio.gather(*calls)):
        ids, _ = gap_free(chunks)
        submit = next(submit for submit in engine.submits if submit.sampling.seed == seed)
        assert start.seed == seed
        assert ids == [token_of(submit, index) for index in range(20)]


async def test_a_failing_request_hurts_nobody_else(
    engine: FakeEngine, stub: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    neighbour = asyncio.ensure_future(stub.Generate(ask(max_tokens=100)))
    await until(lambda: engine.submits)
    with monkeypatch.context() as patch:
        patch.setattr(intake, "RunningRequest", lambda *_: 1 / 0)
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await stub.Generate(ask())
    assert error.value.code() == grpc.StatusCode.INTERNAL
    reference = error.value.details().split()[-1]
    assert [reference in record.message for record in caplog.records if record.exc_info] == [True]
    assert engine.aborted == [engine.submits[1].handle]
    assert len((await neighbour).samples[0].token_ids) == 100


async def test_verdicts_of_the_engine(engine: FakeEngine, stub: Any) -> None:
    expected = {
        engine_pb2.OUTCOME_REJECTED: grpc.StatusCode.INVALID_ARGUMENT,
        engine_pb2.OUTCOME_OVERLOADED: grpc.StatusCode.RESOURCE_EXHAUSTED,
        engine_pb2.OUTCOME_UNAVAILABLE: grpc.StatusCode.UNAVAILABLE,
        engine_pb2.OUTCOME_ERROR: grpc.StatusCode.INTERNAL,
    }
    for outcome, status in expected.items():
        engine.verdict = engine_pb2.FinishedRequest(outcome=outcome, message="says the engine")
        engine.tokens_before_verdict = 3
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await stub.Generate(ask())
        assert (error.value.code(), error.value.details()) == (status, "says the engine")
        call = stub.GenerateStream(ask())
        with pytest.raises(grpc.aio.AioRpcError) as error:
            ids = [token async for message in call for token in message.chunk.token_ids]
            assert len(ids) == 3
        assert error.value.code() == status
    assert not engine.aborted


async def test_tokenize_and_detokenize(stub: Any, checkpoint: Path) -> None:
    text = "größer 日本語 🙂"
    ids = (await stub.Tokenize(pb.TokenizeRequest(text=text))).token_ids
    assert (await stub.Detokenize(pb.DetokenizeRequest(token_ids=ids))).text == text
    chat = pb.ChatMessages(messages=[pb.ChatMessage(role="user", content="hi")])
    ids = (await stub.Tokenize(pb.TokenizeRequest(chat=chat))).token_ids
    shown = await stub.Detokenize(pb.DetokenizeRequest(token_ids=ids, skip_special_tokens=False))
    assert shown.text == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"


async def test_model_and_cluster(stub: Any) -> None:
    info = await stub.GetModelInfo(pb.GetModelInfoRequest())
    assert (info.model, info.model_fingerprint, info.dtype) == ("tiny", "f00d", "float32")
    assert (info.vocab_size, info.max_total_tokens, list(info.eos_token_ids)) == (512, 1000, [2, 0])
    assert info.has_chat_template and list(info.architectures) == ["TinyForCausalLM"]
    status = await stub.GetClusterStatus(pb.GetClusterStatusRequest())
    assert (status.scheduler_id, status.queued_requests, status.oldest_queued_us) == ("test-scheduler", 3, 5)
    assert [(executor.executor_id, executor.total_blocks) for executor in status.executors] == [("fake", 7)]


async def test_end_ids_that_executors_do_not_know_are_left_out(
    engine: FakeEngine, serve: Serve, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = write_checkpoint(tmp_path)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, VOCAB_SIZE, -1]}))
    served = await serve(model=folder)
    for _ in range(2):
        await served.stub.Generate(pb.GenerateRequest(text="a", stop=pb.StopConditions(max_tokens=3)))
    assert [unpack(submit.sampling.stop_token_ids).tolist() for submit in engine.submits] == [[2], [2]]
    warnings = [record.message for record in caplog.records if "end-of-sequence" in record.message]
    assert len(warnings) == 1 and warnings[0].endswith(f"{VOCAB_SIZE}, -1")
