"""What a message has many of is counted before it becomes values of ours, which are many times as large."""

from typing import Any

import pytest
from smg_grpc_proto.generated import vllm_engine_pb2 as vllm

from baton_protos import generation_pb2 as pb
from scheduler_service.api import generation_wire
from scheduler_service.api.errors import RequestError
from scheduler_service.api.vllm_engine import wire as vllm_wire

TOO_MANY = {
    "logit_bias": ("sampling.logit_bias", dict.fromkeys(range(1025), 1.0)),
    "stop_token_ids": ("stop.stop_token_ids", [1] * 16_385),
    "stop": ("stop.stop_strings", ["x"] * 17),
    "choice": ("sampling.structured.choice", ["x"] * 1025),
}


def own(name: str, values: Any) -> pb.GenerateRequest:
    match name:
        case "logit_bias":
            return pb.GenerateRequest(sampling=pb.SamplingParams(logit_bias=values))
        case "choice":
            structured = pb.StructuredOutput(choice=pb.Choices(texts=values))
            return pb.GenerateRequest(sampling=pb.SamplingParams(structured=structured))
        case "stop":
            return pb.GenerateRequest(stop=pb.StopConditions(stop_strings=values))
        case _:
            return pb.GenerateRequest(stop=pb.StopConditions(stop_token_ids=values))


def gateways(name: str, values: Any) -> vllm.GenerateRequest:
    if name == "choice":
        params = vllm.SamplingParams(choice=vllm.ChoiceConstraint(choices=values))
    else:
        params = vllm.SamplingParams(**{name: values})
    return vllm.GenerateRequest(sampling_params=params)


@pytest.mark.parametrize("name", TOO_MANY)
def test_nothing_is_copied_uncounted(name: str) -> None:
    field, values = TOO_MANY[name]
    fewer = dict(list(values.items())[1:]) if isinstance(values, dict) else values[1:]
    for make, decode in ((own, generation_wire.decode_request), (gateways, vllm_wire.decode_request)):
        with pytest.raises(RequestError, match="has more than") as error:
            decode(make(name, values))  # type: ignore[operator]
        assert error.value.field == field
        decode(make(name, fewer))  # type: ignore[operator]
