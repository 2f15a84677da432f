"""The VllmEngine service, through the stubs that gateways are built with."""

import asyncio
import hashlib
import io
import shutil
import zipfile
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_status import rpc_status
from smg_grpc_proto.generated import common_pb2, vllm_engine_pb2, vllm_engine_pb2_grpc

from baton_protos import engine_pb2
from baton_protos.columns import unpack

from .conftest import Serve, free_port, until
from .fake_engine import CACHED_TOKENS, FakeEngine, logprob_of, token_of, top_ids_of

PROMPT = [5, 6, 7]
Dial = Callable[..., Awaitable[vllm_engine_pb2_grpc.VllmEngineStub]]


@pytest.fixture
async def dial(serve: Serve) -> AsyncIterator[Dial]:
    """Start a server and connect as a gateway does: ``await dial(any setting)``."""
    channels: list[grpc.aio.Channel] = []

    async def connect(**settings: Any) -> vllm_engine_pb2_grpc.VllmEngineStub:
        port = settings.setdefault("vllm_grpc_port", free_port())
        await serve(**settings)
        channels.append(grpc.aio.insecure_channel(f"127.0.0.1:{port}"))
        return vllm_engine_pb2_grpc.VllmEngineStub(channels[-1])

    yield connect
    for channel in channels:
        await channel.close()


def ask(stream: bool = True, request_id: str = "cmpl-1", **params: Any) -> vllm_engine_pb2.GenerateRequest:
    """As the gateway writes it: what it always sets is set."""
    fields = {
        "top_p": 1.0,
        "repetition_penalty": 1.0,
        "n": 1,
        "skip_special_tokens": True,
        "ignore_eos": True,
        **params,
    }
    return vllm_engine_pb2.GenerateRequest(
        request_id=request_id,
        tokenized=vllm_engine_pb2.TokenizedInput(input_ids=PROMPT),
        sampling_params=vllm_engine_pb2.SamplingParams(**fields),
        stream=stream,
    )


async def read(
    call: Any,
) -> tuple[list[vllm_engine_pb2.GenerateStreamChunk], list[vllm_engine_pb2.GenerateComplete]]:
    """Chunks and completes of a call; nothing of a sample may come behind its complete."""
    chunks, completes = [], []
    while (message := await call.read()) is not grpc.aio.EOF:
        if message.HasField("chunk"):
            assert message.chunk.index not in {complete.index for complete in completes}
            chunks.append(message.chunk)
        else:
            completes.append(message.complete)
    return chunks, completes


def expected(engine: FakeEngine, sample: int, count: int) -> list[int]:
    return [token_of(engine.submits[sample], index) for index in range(count)]


async def test_a_stream_is_deltas_and_a_complete(engine: FakeEngine, dial: Dial) -> None:
    stub = await dial()
    chunks, (complete,) = await read(stub.Generate(ask(max_tokens=30, seed=7)))
    assert len(chunks) > 1
    assert [token for chunk in chunks for token in chunk.token_ids] == expected(engine, 0, 30)
    assert all(chunk.completion_tokens == len(chunk.token_ids) for chunk in chunks)
    assert all(chunk.prompt_tokens == len(PROMPT) for chunk in chunks)
    assert (complete.finish_reason, complete.completion_tokens, complete.cached_tokens) == ("length", 30, CACHED_TOKENS)
    assert not complete.output_ids  # they would come twice
    assert engine.submits[0].sampling.seed == 7


async def test_without_stream_one_complete_has_everything(engine: FakeEngine, dial: Dial) -> None:
    stub = await dial()
    chunks, (complete,) = await read(stub.Generate(ask(stream=False, max_tokens=30)))
    assert not chunks
    assert complete.output_ids == expected(engine, 0, 30)
    assert (complete.prompt_tokens, complete.completion_tokens) == (3, 30)


@pytest.mark.parametrize("stream", [False, True])
async def test_every_sample_has_a_complete(stream: bool, engine: FakeEngine, dial: Dial) -> None:
    stub = await dial()
    chunks, completes = await read(stub.Generate(ask(stream=stream, max_tokens=10, n=3)))
    assert sorted(complete.index for complete in completes) == [0, 1, 2]
    for index in range(3):
        streamed = [token for chunk in chunks if chunk.index == index for token in chunk.token_ids]
        whole = next(complete for complete in completes if complete.index == index)
        assert [*streamed, *whole.output_ids] == expected(engine, index, 10)


@pytest.mark.parametrize("stream", [False, True])
async def test_log_probabilities(stream: bool, engine: FakeEngine, dial: Dial) -> None:
    stub = await dial()
    request = ask(stream=stream, max_tokens=6, logprobs=2, prompt_logprobs=2)
    chunks, (complete,) = await read(stub.Generate(request))
    parts = [one.output_logprobs for one in (*chunks, complete)]
    tokens = expected(engine, 0, 6)
    assert [token for part in parts for token in part.token_ids] == tokens
    values = [value for part in parts for value in part.token_logprobs]
    assert values == pytest.approx([logprob_of(token) for token in tokens])
    assert [list(top.token_ids) for part in parts for top in part.top_logprobs] == [
        top_ids_of(one, 2) for one in tokens
    ]
    (prompt,) = [one.input_logprobs for one in (*chunks, complete) if one.HasField("input_logprobs")]
    assert list(prompt.token_ids) == PROMPT
    assert not prompt.token_logprobs[0].HasField("value")
    given = [one.value for one in prompt.token_logprobs[1:]]
    assert given == pytest.approx([logprob_of(token) for token in PROMPT[1:]])
    assert [len(top.token_ids) for top in prompt.top_logprobs] == [0, 2, 2]


async def test_stop_ids_and_strings_are_named(engine: FakeEngine, dial: Dial) -> None:
    stub = await dial()
    engine.token = lambda submit, index: 40 + index
    _, (complete,) = await read(stub.Generate(ask(max_tokens=30, stop_token_ids=[45])))
    assert (complete.finish_reason, complete.matched_token_id, complete.completion_tokens) == ("stop", 45, 6)
    text = spelt()
    _, (complete,) = await read(stub.Generate(ask(max_tokens=30, stop=[text])))
    assert (complete.finish_reason, complete.matched_stop_str) == ("stop", text)
    assert complete.completion_tokens < 30


def spelt() -> str:
    """What the ids from 40 on spell, a few of them in: the alphabet of a byte-level tokenizer lies there."""
    return "".join(chr(token - 3 + ord("!")) for token in range(43, 46))


async def test_the_end_of_a_sequence_counts_unless_ignored(engine: FakeEngine, dial: Dial) -> None:
    stub = await dial()
    engine.token = lambda submit, index: 2 if index == 3 else 50
    _, (complete,) = await read(stub.Generate(ask(max_tokens=9, ignore_eos=False)))
    assert (complete.finish_reason, complete.completion_tokens, complete.matched_token_id) == ("stop", 4, 2)
    _, (complete,) = await read(stub.Generate(ask(max_tokens=9)))
    assert (complete.finish_reason, complete.completion_tokens) == ("length", 9)


async def test_what_is_not_set_means_the_default(engine: FakeEngine, dial: Dial) -> None:
    stub = await dial()
    bare = vllm_engine_pb2.GenerateRequest(tokenized=vllm_engine_pb2.TokenizedInput(input_ids=PROMPT))
    await read(stub.Generate(bare))
    (submit,) = engine.submits
    sampling = submit.sampling
    assert (sampling.temperature, sampling.top_k, sampling.top_p, sampling.repetition_penalty) == (1.0, 0, 1.0, 1.0)
    assert submit.max_tokens == engine.limits.max_total_tokens - len(PROMPT)
    await read(stub.Generate(ask(max_tokens=3, temperature=0.0, seed=-1, min_tokens=2, logit_bias={5: 1.5})))
    sampling = engine.submits[1].sampling
    assert (sampling.temperature, sampling.seed, sampling.min_tokens) == (0.0, 2**64 - 1, 2)
    assert unpack(sampling.bias_token_ids).tolist() == [5]


@pytest.mark.parametrize(
    "constraint",
    [
        {"json_schema": '{"type": "object"}'},
        {"json_object": True},
        {"regex": "[a-z]+"},
        {"choice": vllm_engine_pb2.ChoiceConstraint(choices=["yes", "no"])},
        {"grammar": 'start: "a" | "b"'},
    ],
    ids=lambda constraint: next(iter(constraint)),
)
async def test_structured_outputs_become_grammars(constraint: Any, engine: FakeEngine, dial: Dial) -> None:
    stub = await dial(grammar_timeout=30.0)
    await read(stub.Generate(ask(max_tokens=3, **constraint)))
    assert engine.submits[0].sampling.grammar


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"mm_inputs": vllm_engine_pb2.MultimodalInputs()}, "mm_inputs"),
        ({"extra_mm_inputs": [vllm_engine_pb2.MultimodalInputs()]}, "extra_mm_inputs"),
        ({"kv_transfer_params_json": "{}"}, "kv_transfer_params_json"),
        ({"data_parallel_rank": 1}, "data_parallel_rank"),
        (
            {"sampling_params": vllm_engine_pb2.SamplingParams(structural_tag="{}")},
            "sampling_params.structural_tag",
        ),
        (
            {"sampling_params": vllm_engine_pb2.SamplingParams(truncate_prompt_tokens=5)},
            "sampling_params.truncate_prompt_tokens",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
async def test_what_would_change_the_output_is_not_ignored(change: Any, field: str, dial: Dial) -> None:
    stub = await dial()
    request = ask()
    request.MergeFrom(vllm_engine_pb2.GenerateRequest(**change))
    assert await refusal(stub.Generate(request)) == (grpc.StatusCode.UNIMPLEMENTED, field)


async def refusal(call: Any) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await read(call)
    bad = error_details_pb2.BadRequest()
    rpc_status.from_call(error.value).details[0].Unpack(bad)
    return error.value.code(), bad.field_violations[0].field


async def test_abort_ends_the_stream_itself(engine: FakeEngine, dial: Dial) -> None:
    stub = await dial()
    call = stub.Generate(ask(max_tokens=900, request_id="a-b"))
    assert (await call.read()).HasField("chunk")
    await stub.Abort(vllm_engine_pb2.AbortRequest(request_ids=["a-b", "unknown"]))
    _, (complete,) = await read(call)
    assert complete.finish_reason == "abort"
    await until(lambda: not engine.running)
    assert await call.code() is grpc.StatusCode.OK


async def test_abort_reaches_other_api_processes(engine: FakeEngine, dial: Dial) -> None:
    one, other = await dial(index=0), await dial(index=1)
    call = one.Generate(ask(max_tokens=900, request_id="far"))
    await call.read()
    await other.Abort(vllm_engine_pb2.AbortRequest(request_ids=["far"]))
    _, (complete,) = await read(call)
    assert complete.finish_reason == "abort"


async def test_a_cancelled_call_ends_its_request(engine: FakeEngine, dial: Dial) -> None:
    stub = await dial()
    call = stub.Generate(ask(max_tokens=900))
    await call.read()
    call.cancel()
    await until(lambda: not engine.running and engine.aborted)


@pytest.mark.parametrize(
    ("outcome", "code"),
    [
        (engine_pb2.OUTCOME_UNAVAILABLE, grpc.StatusCode.UNAVAILABLE),
        (engine_pb2.OUTCOME_OVERLOADED, grpc.StatusCode.RESOURCE_EXHAUSTED),
        (engine_pb2.OUTCOME_ERROR, grpc.StatusCode.INTERNAL),
    ],
)
async def test_failures_have_their_status(outcome: Any, code: grpc.StatusCode, engine: FakeEngine, dial: Dial) -> None:
    engine.verdict = engine_pb2.FinishedRequest(outcome=outcome, message="so it is")
    stub = await dial()
    for stream in (False, True):
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await read(stub.Generate(ask(stream=stream)))
        assert error.value.code() is code


async def test_health_follows_executors(engine: FakeEngine, dial: Dial) -> None:
    port = free_port()
    stub = await dial(vllm_grpc_port=port)

    async def states() -> tuple[bool, bool]:
        own = await stub.HealthCheck(vllm_engine_pb2.HealthCheckRequest())
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            request = health_pb2.HealthCheckRequest(service="vllm.grpc.engine.VllmEngine")
            standard = await health_pb2_grpc.HealthStub(channel).Check(request)
        return own.healthy, standard.status == health_pb2.HealthCheckResponse.SERVING

    assert await states() == (True, True)
    await engine.set_limits(ready_executors=0)
    async with asyncio.timeout(10):
        while await states() != (False, False):
            await asyncio.sleep(0.01)


async def test_a_gateway_learns_what_it_registers(dial: Dial, checkpoint: Path) -> None:
    stub = await dial()
    info = await stub.GetModelInfo(vllm_engine_pb2.GetModelInfoRequest())
    assert info.is_generation
    assert (info.served_model_name, info.max_context_length, info.vocab_size) == ("tiny", 1000, 512)
    assert (info.tokenizer_path, list(info.eos_token_ids)) == (str(checkpoint), [2, 0])
    server = await stub.GetServerInfo(vllm_engine_pb2.GetServerInfoRequest())
    assert (server.active_requests, server.data_parallel_size, server.model_dtype) == (0, 1, "float32")
    loads = await stub.GetLoads(vllm_engine_pb2.GetLoadsRequest())
    assert [load.num_waiting_reqs for load in loads.loads] == [3]
    assert loads.dp_rank_count == 1


async def test_the_tokenizer_travels_in_chunks(dial: Dial, checkpoint: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(checkpoint, folder)
    (folder / "model.safetensors").write_bytes(b"weights stay here")
    (folder / "extra.jinja").write_bytes(hashlib.shake_256(b"x").digest(200_000))  # does not compress
    stub = await dial(model=folder)
    for _ in range(2):
        chunks = [chunk async for chunk in stub.GetTokenizer(common_pb2.GetTokenizerRequest())]
        data = b"".join(chunk.data for chunk in chunks)
        assert len(chunks) > 3 and all(len(chunk.data) <= 64 * 1024 for chunk in chunks)
        assert [chunk.sha256 for chunk in chunks[:-1]] == [""] * (len(chunks) - 1)
        assert chunks[-1].sha256 == hashlib.sha256(data).hexdigest()
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            names = {path.name for path in folder.iterdir()} - {"model.safetensors"}
            assert set(archive.namelist()) == names
            assert all(archive.read(name) == (folder / name).read_bytes() for name in names)


async def test_the_rest_is_unimplemented(dial: Dial) -> None:
    stub = await dial()
    for call in (stub.Embed(vllm_engine_pb2.EmbedRequest()), stub.FlushCache(common_pb2.FlushCacheRequest())):
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await call
        assert error.value.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_the_port_has_nothing_but_this_service(serve: Serve) -> None:
    port = free_port()
    served = await serve(vllm_grpc_port=port)
    request = vllm_engine_pb2.HealthCheckRequest()
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await vllm_engine_pb2_grpc.VllmEngineStub(served.channel).HealthCheck(request)
    assert error.value.code() is grpc.StatusCode.UNIMPLEMENTED
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        call = channel.unary_unary("/baton.v1.Admin/DrainExecutor")
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await call(b"")
    assert error.value.code() is grpc.StatusCode.UNIMPLEMENTED
