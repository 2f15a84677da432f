"""What the Open Inference Protocol's messages may hold: options, tensors, and everything that is refused."""

import json
from typing import Any

import grpc
import pytest

from baton_protos import open_inference_pb2 as pb
from scheduler_service.api.errors import RequestError
from scheduler_service.api.open_inference import tensors
from scheduler_service.api.open_inference.options import read_options
from scheduler_service.api.request import StructuredKind, StructuredOutput, TokenPrompt

from .conftest import Serve, Served
from .dialects import add_texts
from .entries import refusal
from .fake_engine import FakeEngine
from .inferring import Stub, ask, conversation


@pytest.fixture
async def stub(serve: Serve) -> Stub:
    served: Served = await serve()
    return Stub(served.channel)


def broken(change: Any) -> pb.ModelInferRequest:
    request = ask()
    change(request)
    return request


BAD = {
    "a stream from ModelInfer": (ask(stream=True), "stream"),
    "a stream with its input": (ask(stream=True, exclude_input_in_output=False), "exclude_input_in_output"),
    "an option of no meaning": (ask(best_of=3), "parameters"),
    "an option of another type": (ask(temperature="warm"), "sampling.temperature"),
    "a bool for a number": (ask(top_k=True), "sampling.top_k"),
    "a broken integer": (ask(max_tokens=2.5), "stop.max_tokens"),
    "a number for a flag": (ask(ignore_eos=3), "stop.ignore_eos"),
    "a list for a number": (ask(temperature=[1, 2]), "sampling.temperature"),
    "an object for a text": (ask(stop={"a": 1}), "stop.stop_strings"),
    "half a character": (ask(cache_salt="\ud800"), "sampling_parameters"),
    "the same under two names": (ask(random_seed=3), "sampling.seed"),
    "no JSON": (broken(lambda r: add_texts(r, "guided_decoding", ["{"], raw=True)), "sampling.structured"),
    "an unknown output": (ask(outputs=["bytes_output"]), "outputs"),
    "an unknown format": (ask(structured_outputs={"xml": "a"}), "sampling.structured"),
    "two formats": (ask(structured_outputs={"regex": "a", "json_object": True}), "sampling.structured"),
    "an option given twice": (broken(lambda r: add_texts(r, "seed", ["1"], raw=True)), "parameters"),
    "two prompts": (
        broken(
            lambda r: (r.inputs.add(name="input_ids", datatype="INT32", shape=[0]), r.raw_input_contents.append(b""))
        ),
        "prompt",
    ),
    "too few contents": (broken(lambda r: r.raw_input_contents.pop()), "raw_input_contents"),
    "an unknown datatype": (broken(lambda r: setattr(r.inputs[0], "datatype", "TEXT")), "inputs"),
    "a shape that is not its data's": (broken(lambda r: r.inputs[0].shape.__setitem__(0, 2)), "inputs"),
    "a negative shape": (broken(lambda r: r.inputs[0].shape.extend([-1, -1])), "inputs"),
    "a huge shape": (broken(lambda r: r.inputs[0].shape.extend([2**62, 2**62])), "inputs"),
    "many dimensions": (broken(lambda r: r.inputs[0].shape.extend([1] * 9)), "inputs"),
    "many numbers": (
        broken(
            lambda r: (
                r.inputs.add(name="top_k", datatype="INT8", shape=[1 << 17]),
                r.raw_input_contents.append(bytes(1 << 17)),
            )
        ),
        "inputs",
    ),
    "a tensor given twice": (broken(lambda r: add_texts(r, "text_input", ["a"], raw=True)), "inputs"),
    "lengths beyond the data": (broken(lambda r: r.raw_input_contents.__setitem__(0, b"\xff\xff\xff\xff")), "inputs"),
    "no UTF-8": (broken(lambda r: r.raw_input_contents.__setitem__(0, b"\x01\0\0\0\xff")), "inputs"),
    "shared memory": (
        broken(lambda r: r.inputs[0].parameters["shared_memory_region"].MergeFrom(pb.InferParameter(string_param="a"))),
        "inputs",
    ),
    "too many tensors": (broken(lambda r: [r.inputs.add(name=str(i)) for i in range(65)]), "inputs"),
}


@pytest.mark.parametrize("name", BAD)
async def test_bad_requests_name_the_culprit(name: str, engine: FakeEngine, stub: Stub) -> None:
    request, field = BAD[name]
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await stub.ModelInfer(request)
    assert refusal(error.value) == ("INVALID_ARGUMENT", field)
    if name != "a stream from ModelInfer":
        (answer,) = await conversation(stub, request)
        assert answer.error_message.startswith(f"{field}: ")
    assert not engine.submits


async def test_other_models_and_versions_are_not_found(stub: Stub) -> None:
    for change in ({"model_name": "big"}, {"model_version": "2"}):
        request = ask()
        request.MergeFrom(pb.ModelInferRequest(**change))
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await stub.ModelInfer(request)
        assert error.value.code() is grpc.StatusCode.NOT_FOUND


@pytest.mark.parametrize(
    ("said", "meant"),
    [
        ({"json": {"type": "object"}}, StructuredOutput(StructuredKind.JSON_SCHEMA, ('{"type": "object"}',))),
        ({"json": '{"type": "object"}'}, StructuredOutput(StructuredKind.JSON_SCHEMA, ('{"type": "object"}',))),
        ({"json_object": True}, StructuredOutput(StructuredKind.JSON_OBJECT)),
        ({"choice": ["a", "b"]}, StructuredOutput(StructuredKind.CHOICE, ("a", "b"))),
        ({"regex": "a+"}, StructuredOutput(StructuredKind.REGEX, ("a+",))),
        ({"grammar": "start: A"}, StructuredOutput(StructuredKind.GRAMMAR, ("start: A",))),
    ],
)
def test_structured_outputs(said: dict[str, Any], meant: StructuredOutput) -> None:
    for value in (said, json.dumps(said), [json.dumps(said)]):
        assert read_options({"structured_outputs": value}, None, "").sampling.structured == meant


def test_numbers_may_be_texts() -> None:
    options = {"temperature": "0.7", "max_tokens": "16", "ignore_eos": "True", "top_k": 4.0, "timeout": 1500}
    request = read_options(options, TokenPrompt([5]), "tiny")
    assert (request.sampling.temperature, request.sampling.top_k) == (0.7, 4)
    assert (request.stop.max_tokens, request.stop.ignore_eos, request.queue_timeout_ms) == (16, True, 2)


@pytest.mark.parametrize("datatype", ["BOOL", "INT8", "UINT16", "INT64", "UINT64", "FP16", "FP32", "FP64", "BYTES"])
def test_tensors_come_back_as_they_went(datatype: str) -> None:
    elements = {"BOOL": [True, False], "BYTES": ["", "größer 🙂"]}.get(datatype, [0, 1])
    data = tensors.to_raw(tensors.Tensor("x", datatype, elements))
    assert tensors.from_raw("x", datatype, [2, 1], data) == tensors.Tensor("x", datatype, elements)
    with pytest.raises(RequestError):
        tensors.from_raw("x", datatype, [2, 1], data + b"\0")
