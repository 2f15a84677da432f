"""A caller who has neither our stubs nor our protos, as grpcurl: reflection is enough to call everything."""

import asyncio
from typing import Any

import grpc
import pytest
from google.protobuf import json_format
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message_factory import GetMessageClass
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from .conftest import Serve, Served, free_port

MAIN = {
    "baton.v1.Admin",
    "baton.v1.Generation",
    "grpc.health.v1.Health",
    "grpc.reflection.v1alpha.ServerReflection",
    "inference.GRPCInferenceService",
}
GATEWAY = {"grpc.health.v1.Health", "grpc.reflection.v1alpha.ServerReflection", "vllm.grpc.engine.VllmEngine"}


class Stranger:
    """Knows an address. Used off the event loop: reflection's client blocks."""

    def __init__(self, address: str) -> None:
        self._channel = grpc.insecure_channel(address)
        self._database = ProtoReflectionDescriptorDatabase(self._channel)
        self._pool = DescriptorPool(self._database)

    def services(self) -> set[str]:
        return set(self._database.get_services())

    def methods(self, service: str) -> list[str]:
        return [method.name for method in self._pool.FindServiceByName(service).methods]

    def call(self, service: str, method: str, *requests: dict[str, Any]) -> list[dict[str, Any]]:
        """Messages go in and come out as JSON; streams are what the descriptor says they are."""
        descriptor = self._pool.FindServiceByName(service).methods_by_name[method]
        request_class, response_class = GetMessageClass(descriptor.input_type), GetMessageClass(descriptor.output_type)
        messages = [json_format.ParseDict(one, request_class(), descriptor_pool=self._pool) for one in requests]
        codec = (request_class.SerializeToString, response_class.FromString)
        path = f"/{service}/{method}"
        answers: Any
        if descriptor.client_streaming:
            answers = self._channel.stream_stream(path, *codec)(iter(messages), timeout=30)
        elif descriptor.server_streaming:
            answers = self._channel.unary_stream(path, *codec)(messages[0], timeout=30)
        else:
            answers = [self._channel.unary_unary(path, *codec)(messages[0], timeout=30)]
        return [json_format.MessageToDict(answer) for answer in answers]

    def close(self) -> None:
        self._channel.close()


async def test_generate_through_reflection_alone(serve: Serve) -> None:
    served: Served = await serve()

    def explore() -> tuple[list[Any], list[Any]]:
        stranger = Stranger(f"127.0.0.1:{served.server.port}")
        assert stranger.services() == MAIN
        for service in MAIN:
            assert stranger.methods(service)
        request = {"text": "def add(a, b):", "stop": {"max_tokens": 9, "ignore_eos": True}, "sampling": {"seed": "7"}}
        whole = stranger.call("baton.v1.Generation", "Generate", request)
        stream = stranger.call("baton.v1.Generation", "GenerateStream", request)
        stranger.close()
        return whole, stream

    (whole,), stream = await asyncio.to_thread(explore)
    (sample,) = whole["samples"]
    assert len(sample["tokenIds"]) == 9
    chunks = [message["chunk"] for message in stream if "chunk" in message]
    assert "".join(chunk.get("text", "") for chunk in chunks) == sample["text"]
    assert stream[-1]["end"]["finishReason"] == "FINISH_REASON_LENGTH"


async def test_going_on_elsewhere_with_json_alone(serve: Serve) -> None:
    """As docs/clients.md says: from a stream's first message, the ids that came, and how much text."""
    first, second = [await serve(index=index) for index in range(2)]
    request = {"text": "def größer(a, 🙂):", "stop": {"max_tokens": 40, "ignore_eos": True}}

    def explore(limit: int) -> tuple[list[Any], list[Any]]:
        strangers = [Stranger(f"127.0.0.1:{one.server.port}") for one in (first, second)]
        stream = strangers[0].call("baton.v1.Generation", "GenerateStream", request)
        came = stream[:limit]
        start, chunks = came[0]["start"], [message["chunk"] for message in came[1:]]
        continuation = {
            "stop": request["stop"],
            "token_ids": {"ids": start["promptTokenIds"]},
            "sampling": {"seed": start["seed"]},
            "resume": [
                {
                    "token_ids": [token_id for chunk in chunks for token_id in chunk.get("tokenIds", ())],
                    "text_offset": len("".join(chunk.get("text", "") for chunk in chunks)),
                }
            ],
        }
        rest = strangers[1].call("baton.v1.Generation", "GenerateStream", continuation)
        for stranger in strangers:
            stranger.close()
        return stream, came + rest[1:]

    def told(messages: list[Any]) -> tuple[str, list[int]]:
        chunks = [message["chunk"] for message in messages if "chunk" in message]
        text = "".join(chunk.get("text", "") for chunk in chunks)
        return text, [token_id for chunk in chunks for token_id in chunk.get("tokenIds", ())]

    for limit in (1, 3, 6):
        whole, pieced = await asyncio.to_thread(explore, limit)
        assert told(pieced) == told(whole)
        assert pieced[-1] == whole[-1]


async def test_infer_through_reflection_alone(serve: Serve) -> None:
    served: Served = await serve()
    request = {
        "inputs": [{"name": "text_input", "datatype": "BYTES", "shape": [1], "contents": {"bytesContents": ["YWI="]}}],
        "parameters": {"max_tokens": {"int64Param": 3}, "ignore_eos": {"boolParam": True}},
        "outputs": [{"name": "num_output_tokens"}],
    }

    def infer() -> list[Any]:
        stranger = Stranger(f"127.0.0.1:{served.server.port}")
        service = "inference.GRPCInferenceService"
        answers = stranger.call(service, "ModelInfer", request) + [
            one["inferResponse"] for one in stranger.call(service, "ModelStreamInfer", request, request)
        ]
        stranger.close()
        return answers

    answers = await asyncio.to_thread(infer)
    assert [answer["outputs"][0]["contents"]["uintContents"] for answer in answers] == [[3]] * 3


@pytest.mark.parametrize("tokenized", [True, False])
async def test_the_gateways_port_reflects_itself(tokenized: bool, serve: Serve) -> None:
    port = free_port()
    await serve(vllm_grpc_port=port)
    prompt = {"tokenized": {"input_ids": [5, 6, 7]}} if tokenized else {"text": "def add"}
    request = {**prompt, "sampling_params": {"max_tokens": 3, "ignore_eos": True}}

    def explore() -> list[Any]:
        stranger = Stranger(f"127.0.0.1:{port}")
        assert stranger.services() == GATEWAY
        answers = stranger.call("vllm.grpc.engine.VllmEngine", "Generate", request)
        stranger.close()
        return answers

    (answer,) = await asyncio.to_thread(explore)
    assert answer["complete"]["finishReason"] == "length"
    assert len(answer["complete"]["outputIds"]) == 3
