"""The Open Inference Protocol: options, tensors, one-shot inferences, and streams of them."""

import asyncio
import json
from collections.abc import AsyncIterator, Iterable

import grpc
import numpy as np
import pytest

from baton_protos import engine_pb2
from baton_protos import open_inference_pb2 as pb
from baton_protos.columns import unpack
from scheduler_service.api.open_inference.inference import OUTPUTS

from .conftest import Serve, Served, until
from .dialects import add_texts
from .fake_engine import FakeEngine
from .inferring import TEXT, Stub, ask, conversation, is_final, values


@pytest.fixture
async def stub(serve: Serve) -> Stub:
    served: Served = await serve()
    return Stub(served.channel)


@pytest.mark.parametrize("raw", [True, False], ids=["raw", "typed"])
async def test_infer(raw: bool, engine: FakeEngine, stub: Stub) -> None:
    request = ask(raw=raw, call_id="mine", outputs=OUTPUTS, max_tokens=9, top_k=3)
    response = await stub.ModelInfer(request)
    assert (response.model_name, response.model_version, response.id) == ("tiny", "1", "mine")
    assert bool(response.raw_output_contents) is raw
    got = values(response)
    assert set(got) == set(OUTPUTS)
    assert got["finish_reason"] == ["length"]
    assert got["num_output_tokens"] == [9]
    (submit,) = engine.submits
    assert got["num_input_tokens"] == [len(unpack(submit.prompt_token_ids))]
    assert (submit.max_tokens, submit.sampling.top_k, submit.sampling.seed) == (9, 3, 7)
    (text,) = got["text_output"]
    assert text.startswith(TEXT) and len(text) > len(TEXT)
    (logprobs,) = got["logprobs"]
    entries = json.loads(logprobs)
    assert [len(entry) for entry in entries] == [1] * 9
    total = sum(one["logprob"] for entry in entries for one in entry.values())
    assert got["cumulative_logprob"] == pytest.approx([total])


async def test_the_input_is_left_out_on_demand(stub: Stub) -> None:
    (whole,) = values(await stub.ModelInfer(ask()))["text_output"]
    (alone,) = values(await stub.ModelInfer(ask(exclude_input_in_output=True)))["text_output"]
    assert whole == TEXT + alone


async def test_options_may_be_tensors_and_parameters(engine: FakeEngine, stub: Stub) -> None:
    request = pb.ModelInferRequest(model_name="tiny")
    add_texts(request, "text_input", [TEXT], raw=True)
    add_texts(request, "stop_words", ["\0one", "\0two"], raw=True)
    for name, datatype, data in (
        ("max_tokens", "INT32", np.array([[5]], "<i4")),
        ("temperature", "FP32", np.array([0.25], "<f4")),
        ("seed", "UINT64", np.array([2**64 - 1], "<u8")),
    ):
        request.inputs.add(name=name, datatype=datatype, shape=data.shape)
        request.raw_input_contents.append(data.tobytes())
    request.parameters["top_k"].int64_param = 4
    request.parameters["top_p"].double_param = 0.5
    request.parameters["priority"].uint64_param = 9
    request.parameters["ignore_eos"].bool_param = True
    request.parameters["logit_bias"].string_param = '{"5": 1.5}'
    await stub.ModelInfer(request)
    (submit,) = engine.submits
    sampling = submit.sampling
    assert (submit.max_tokens, submit.priority) == (5, 9)
    assert (sampling.temperature, sampling.top_k, sampling.top_p, sampling.seed) == (0.25, 4, 0.5, 2**64 - 1)
    assert unpack(sampling.bias_token_ids).tolist() == [5]


async def test_token_prompts(engine: FakeEngine, stub: Stub) -> None:
    for datatype, dtype in (("INT32", "<i4"), ("INT64", "<i8"), ("UINT32", "<u4")):
        request = pb.ModelInferRequest()
        request.inputs.add(name="input_ids", datatype=datatype, shape=[1, 3])
        request.raw_input_contents.append(np.array([5, 6, 7], dtype).tobytes())
        request.parameters["max_tokens"].int64_param = 2
        assert len(values(await stub.ModelInfer(request))["text_output"]) == 1
        assert unpack(engine.submits[-1].prompt_token_ids).tolist() == [5, 6, 7]


async def test_samples_share_an_answer(engine: FakeEngine, stub: Stub) -> None:
    got = values(await stub.ModelInfer(ask(n=3, exclude_input_in_output=True, outputs=OUTPUTS)))
    assert len(engine.submits) == 3
    assert len(set(got["text_output"])) == 3
    assert got["num_output_tokens"] == [20] * 3
    answers = await conversation(stub, ask(n=3, stream=True, outputs=OUTPUTS))
    parts = [values(answer.infer_response) for answer in answers]
    assert ["".join(part["text_output"][sample] for part in parts) for sample in range(3)] == got["text_output"]
    assert [sum(part["num_output_tokens"][sample] for part in parts) for sample in range(3)] == [20] * 3
    assert [is_final(answer) for answer in answers] == [False] * (len(answers) - 1) + [True]
    reasons = [reason for part in parts for reason in part["finish_reason"] if reason]
    assert reasons == ["length"] * 3
    assert parts[-1]["cumulative_logprob"] == pytest.approx(got["cumulative_logprob"])


@pytest.mark.parametrize("raw", [True, False], ids=["raw", "typed"])
async def test_a_stream_gives_pieces(raw: bool, stub: Stub) -> None:
    (whole,) = values(await stub.ModelInfer(ask(exclude_input_in_output=True)))["text_output"]
    answers = await conversation(stub, ask(raw=raw, stream=True, call_id="s", return_finish_reason=True))
    assert len(answers) > 2
    assert all(answer.infer_response.id == "s" and not answer.error_message for answer in answers)
    parts = [values(answer.infer_response) for answer in answers]
    assert "".join(part["text_output"][0] for part in parts) == whole
    assert [part["finish_reason"] for part in parts] == [[""]] * (len(parts) - 1) + [["length"]]
    assert [is_final(answer) for answer in answers] == [False] * (len(answers) - 1) + [True]


async def test_a_stream_takes_inferences_that_do_not_stream(stub: Stub) -> None:
    (answer,) = await conversation(stub, ask())
    assert is_final(answer)
    assert values(answer.infer_response) == values(await stub.ModelInfer(ask()))


async def test_the_last_answer_may_be_empty(engine: FakeEngine, stub: Stub) -> None:
    engine.token = lambda submit, index: 2 if index == 5 else 50  # the end of the sequence has no text
    engine.step_seconds = 0.1  # so that the end is a message of its own
    request = ask(stream=True, ignore_eos=False)
    answers = await conversation(stub, request)
    assert values(answers[-1].infer_response) == {"text_output": [""]}
    request.parameters["triton_enable_empty_final_response"].bool_param = True
    answers = await conversation(stub, request)
    assert is_final(answers[-1])
    assert values(answers[-1].infer_response) == {}
    assert sum(is_final(answer) for answer in answers) == 1


async def test_inferences_of_a_stream_run_side_by_side(engine: FakeEngine, stub: Stub) -> None:
    lengths = {"long": 200, "short": 5, "bad": 10**9, "middle": 40}
    requests = [ask(stream=True, call_id=name, max_tokens=length) for name, length in lengths.items()]
    answers = await conversation(stub, *requests)
    ends = [answer.infer_response.id for answer in answers if is_final(answer)]
    assert ends == ["bad", "short", "middle", "long"]
    errors = {answer.infer_response.id: answer.error_message for answer in answers if answer.error_message}
    assert list(errors) == ["bad"]
    assert errors["bad"].startswith("[request id: bad] stop.max_tokens: ")
    for name in ("long", "short", "middle"):
        again = await conversation(stub, ask(stream=True, call_id=name, max_tokens=lengths[name]))
        assert texts(answers, name) == texts(again, name)


def texts(answers: Iterable[pb.ModelStreamInferResponse], call_id: str) -> str:
    mine = [answer.infer_response for answer in answers if answer.infer_response.id == call_id]
    return "".join(values(response)["text_output"][0] for response in mine)


async def test_more_than_may_run_wait_their_turn(engine: FakeEngine, stub: Stub) -> None:
    engine.paused = True
    asking = asyncio.create_task(conversation(stub, *[ask(max_tokens=1, call_id=str(i)) for i in range(150)]))
    await until(lambda: len(engine.submits) == 128)
    await asyncio.sleep(0.2)
    assert len(engine.submits) == 128
    engine.paused = False
    answers = await asking
    assert {answer.infer_response.id for answer in answers} == {str(index) for index in range(150)}


async def test_a_cancelled_stream_ends_all_its_inferences(engine: FakeEngine, stub: Stub) -> None:
    async def requests() -> AsyncIterator[pb.ModelInferRequest]:
        for index in range(5):
            yield ask(stream=True, max_tokens=900, call_id=str(index))
        await asyncio.Event().wait()

    call = stub.ModelStreamInfer(requests())
    await call.read()
    await until(lambda: len(engine.running) == 5)
    call.cancel()
    await until(lambda: not engine.running)
    assert len(engine.aborted) == 5


async def test_an_unread_stream_is_cut(engine: FakeEngine, serve: Serve) -> None:
    engine.frames_per_step = 50
    engine.limits.max_total_tokens = 1_000_000
    served = await serve(slow_client_timeout=0.5)
    options = [("grpc.http2.lookahead_bytes", 1024), ("grpc.http2.bdp_probe", 0)]
    async with grpc.aio.insecure_channel(f"127.0.0.1:{served.server.port}", options) as channel:
        requests = [ask(stream=True, max_tokens=200_000) for _ in range(4)]
        call = Stub(channel).ModelStreamInfer(iter(requests))
        await call.read()
        await until(lambda: len(engine.aborted) == 4, timeout=60.0)


async def test_a_failing_inference_leaves_the_stream_open(engine: FakeEngine, stub: Stub) -> None:
    engine.verdict = engine_pb2.FinishedRequest(outcome=engine_pb2.OUTCOME_ERROR, message="it broke")
    engine.tokens_before_verdict = 3
    sent: asyncio.Queue[pb.ModelInferRequest] = asyncio.Queue()

    async def requests() -> AsyncIterator[pb.ModelInferRequest]:
        while True:
            yield await sent.get()

    call = stub.ModelStreamInfer(requests())
    for call_id in ("one", "two"):
        await sent.put(ask(stream=True, call_id=call_id))
        while not is_final(answer := await call.read()):
            pass
        assert (answer.infer_response.id, bool(answer.error_message)) == (call_id, True)
    call.cancel()


async def test_an_idle_stream_does_not_hold_up_a_shutdown(serve: Serve) -> None:
    served = await serve(shutdown_grace=60.0)
    never = asyncio.Event()

    async def requests() -> AsyncIterator[pb.ModelInferRequest]:
        yield ask()
        await never.wait()

    call = Stub(served.channel).ModelStreamInfer(requests())
    await call.read()
    async with asyncio.timeout(20):
        await served.server.stop()
    assert await call.read() is grpc.aio.EOF
    assert await call.code() is grpc.StatusCode.OK


async def test_the_server_and_the_model_describe_themselves(engine: FakeEngine, serve: Serve) -> None:
    stub = Stub((await serve()).channel)
    assert (await stub.ServerLive(pb.ServerLiveRequest())).live
    assert (await stub.ServerReady(pb.ServerReadyRequest())).ready
    for name, version, ready in (("tiny", "", True), ("tiny", "1", True), ("tiny", "2", False), ("big", "", False)):
        assert (await stub.ModelReady(pb.ModelReadyRequest(name=name, version=version))).ready is ready
    assert (await stub.ServerMetadata(pb.ServerMetadataRequest())).name == "baton"
    metadata = await stub.ModelMetadata(pb.ModelMetadataRequest(name="tiny"))
    assert {tensor.name for tensor in metadata.outputs} == set(OUTPUTS)
    config = (await stub.ModelConfig(pb.ModelConfigRequest(name="tiny"))).config
    assert config.model_transaction_policy.decoupled
    assert [tensor.name for tensor in config.input] == [tensor.name for tensor in metadata.inputs]
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await stub.ModelMetadata(pb.ModelMetadataRequest(name="big"))
    assert error.value.code() is grpc.StatusCode.NOT_FOUND
    await engine.set_limits(ready_executors=0)
    async with asyncio.timeout(10):
        while (await stub.ServerReady(pb.ServerReadyRequest())).ready:
            await asyncio.sleep(0.01)


async def test_statistics_count(stub: Stub) -> None:
    for _ in range(3):
        await stub.ModelInfer(ask())
    await conversation(stub, ask(stream=True), ask(max_tokens=0))
    (stats,) = (await stub.ModelStatistics(pb.ModelStatisticsRequest(name="tiny"))).model_stats
    assert (stats.inference_count, stats.inference_stats.success.count, stats.inference_stats.fail.count) == (4, 4, 1)
    assert stats.inference_stats.success.ns > 0


async def test_it_can_be_switched_off(serve: Serve) -> None:
    served = await serve(open_inference=False)
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await Stub(served.channel).ServerLive(pb.ServerLiveRequest())
    assert error.value.code() is grpc.StatusCode.UNIMPLEMENTED
