"""Inferences for tests, and their answers."""

import json
from collections.abc import Iterable
from typing import Any

import numpy as np

from baton_protos import open_inference_pb2 as pb
from baton_protos import open_inference_pb2_grpc

from .dialects import add_texts

TEXT = "def add(a, b):"
FINAL = "triton_final_response"
Stub = open_inference_pb2_grpc.GRPCInferenceServiceStub


def ask(
    text: str = TEXT, *, call_id: str = "", raw: bool = True, outputs: Iterable[str] = (), **options: Any
) -> pb.ModelInferRequest:
    """An inference as tritonclient writes it; options other than ``stream`` and flags go into sampling_parameters."""
    request = pb.ModelInferRequest(model_name="tiny", id=call_id)
    add_texts(request, "text_input", [text], raw=raw)
    flags = [name for name in options if name in ("stream", "exclude_input_in_output") or name.startswith("return_")]
    for name in flags:
        tensor = request.inputs.add(name=name, datatype="BOOL", shape=[1])
        value = bool(options.pop(name))
        if raw:
            request.raw_input_contents.append(np.array([value]).tobytes())
        else:
            tensor.contents.bool_contents.append(value)
    options = {"max_tokens": 20, "ignore_eos": True, "seed": 7, **options}
    add_texts(request, "sampling_parameters", [json.dumps(options)], raw=raw)
    for name in outputs:
        request.outputs.add(name=name)
    return request


def values(response: pb.ModelInferResponse) -> dict[str, list[Any]]:
    """Elements of all outputs, read by this test's own rules; texts as str."""
    result: dict[str, list[Any]] = {}
    for index, output in enumerate(response.outputs):
        if not response.raw_output_contents:
            ((_, elements),) = output.contents.ListFields()
            result[output.name] = [one.decode() if isinstance(one, bytes) else one for one in elements]
        elif output.datatype == "BYTES":
            data, texts = response.raw_output_contents[index], []
            while data:
                length = int.from_bytes(data[:4], "little")
                texts.append(data[4 : 4 + length].decode())
                data = data[4 + length :]
            result[output.name] = texts
        else:
            dtype = {"UINT32": "<u4", "FP32": "<f4"}[output.datatype]
            result[output.name] = np.frombuffer(response.raw_output_contents[index], dtype).tolist()
        assert list(output.shape) == [len(result[output.name])]
    return result


def is_final(answer: pb.ModelStreamInferResponse) -> bool:
    return answer.infer_response.parameters[FINAL].bool_param


async def conversation(stub: Stub, *requests: pb.ModelInferRequest) -> list[pb.ModelStreamInferResponse]:
    """All answers of a stream whose requests are sent at once."""
    return [answer async for answer in stub.ModelStreamInfer(iter(requests))]
