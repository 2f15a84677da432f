"""open_inference.proto <-> plain values."""

from collections.abc import Mapping

from baton_protos import open_inference_pb2 as pb
from scheduler_service.api.errors import RequestError, invalid
from scheduler_service.api.open_inference.inference import INPUTS, OUTPUTS, Answer, Inference, read_inference
from scheduler_service.api.open_inference.options import Value
from scheduler_service.api.open_inference.statistics import Statistics, Tally
from scheduler_service.api.open_inference.tensors import Tensor, from_elements, from_raw, to_raw

VERSION = "1"  # of the one model
PLATFORM = "baton"
_FINAL = "triton_final_response"
_MAX_TENSORS = 64
_MAX_ID_CHARS = 128  # in messages
_CONTENTS = {
    "BYTES": "bytes_contents",
    "BOOL": "bool_contents",
    "INT8": "int_contents",
    "INT16": "int_contents",
    "INT32": "int_contents",
    "INT64": "int64_contents",
    "UINT8": "uint_contents",
    "UINT16": "uint_contents",
    "UINT32": "uint_contents",
    "UINT64": "uint64_contents",
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
}
_CONFIG_TYPES = {
    "BYTES": pb.TYPE_STRING,
    "BOOL": pb.TYPE_BOOL,
    "INT32": pb.TYPE_INT32,
    "UINT32": pb.TYPE_UINT32,
    "FP32": pb.TYPE_FP32,
}


def decode_inference(message: pb.ModelInferRequest) -> Inference:
    """A ModelInfer request, or one of a stream.

    Raises:
        RequestError: INVALID_ARGUMENT, something in it is unknown, malformed or too much.
    """
    for field, items in (("inputs", message.inputs), ("outputs", message.outputs), ("parameters", message.parameters)):
        if len(items) > _MAX_TENSORS:
            raise invalid(field, f"has more than {_MAX_TENSORS} entries")
    if len({tensor.name for tensor in message.inputs}) < len(message.inputs):
        raise invalid("inputs", "has two tensors of one name")
    for field, ones in (("inputs", message.inputs), ("outputs", message.outputs)):
        if any(one.parameters for one in ones):  # shared memory, classification
            raise invalid(field, "has parameters, which are not supported here")
    raw = bool(message.raw_input_contents)
    if raw and len(message.raw_input_contents) != len(message.inputs):
        raise invalid("raw_input_contents", "must have one entry for each input")
    contents = message.raw_input_contents if raw else [None] * len(message.inputs)
    return read_inference(
        message.id,
        message.model_name,
        [_decode_tensor(tensor, data) for tensor, data in zip(message.inputs, contents, strict=True)],
        _decode_parameters(message.parameters),
        [output.name for output in message.outputs],
        raw=raw,
    )


def _decode_tensor(tensor: pb.ModelInferRequest.InferInputTensor, data: bytes | None) -> Tensor:
    if data is not None:
        return from_raw(tensor.name, tensor.datatype, tensor.shape, data)
    field = _CONTENTS.get(tensor.datatype)
    return from_elements(
        tensor.name, tensor.datatype, tensor.shape, getattr(tensor.contents, field) if field is not None else ()
    )


def _decode_parameters(parameters: Mapping[str, pb.InferParameter]) -> dict[str, Value]:
    values = {}
    for name, parameter in parameters.items():
        choice = parameter.WhichOneof("parameter_choice")
        if choice is not None:
            values[name] = getattr(parameter, choice)
    return values


def encode_answer(inference: Inference, model: str, answer: Answer) -> pb.ModelInferResponse:
    """An answer, in the form in which the inputs came."""
    response = pb.ModelInferResponse(model_name=model, model_version=VERSION, id=inference.id)
    for tensor in answer.outputs:
        output = response.outputs.add(name=tensor.name, datatype=tensor.datatype, shape=[len(tensor.elements)])
        if inference.raw:
            response.raw_output_contents.append(to_raw(tensor))
        else:
            elements = [one.encode() if isinstance(one, str) else one for one in tensor.elements]
            getattr(output.contents, _CONTENTS[tensor.datatype]).extend(elements)
    return response


def encode_streamed(inference: Inference, model: str, answer: Answer) -> pb.ModelStreamInferResponse:
    """An answer in a stream; it says whether it is the last."""
    response = encode_answer(inference, model, answer)
    response.parameters[_FINAL].bool_param = answer.final
    return pb.ModelStreamInferResponse(infer_response=response)


def encode_stream_error(call_id: str, model: str, message: str) -> pb.ModelStreamInferResponse:
    """The last answer of an inference that failed. Clients see but the text, so it says whose it is, as Triton's do."""
    response = pb.ModelInferResponse(model_name=model, model_version=VERSION, id=call_id)
    response.parameters[_FINAL].bool_param = True
    whose = f"[request id: {call_id[:_MAX_ID_CHARS]}] " if call_id else ""
    return pb.ModelStreamInferResponse(error_message=whose + message, infer_response=response)


def describe(error: RequestError) -> str:
    """An error as text: in a stream there is no status."""
    return f"{error.field}: {error.message}" if error.field else error.message


def encode_metadata(model: str) -> pb.ModelMetadataResponse:
    """What the model takes and gives."""
    tensor = pb.ModelMetadataResponse.TensorMetadata
    return pb.ModelMetadataResponse(
        name=model,
        versions=[VERSION],
        platform=PLATFORM,
        inputs=[tensor(name=name, datatype=datatype, shape=shape) for name, datatype, shape in INPUTS],
        outputs=[tensor(name=name, datatype=datatype, shape=shape) for name, (datatype, shape) in OUTPUTS.items()],
    )


def encode_config(model: str) -> pb.ModelConfigResponse:
    """The same as a configuration of Triton's, for clients that ask for it."""
    inputs = [
        pb.ModelInput(name=name, data_type=_CONFIG_TYPES[datatype], dims=shape, optional=name != INPUTS[0][0])
        for name, datatype, shape in INPUTS
    ]
    outputs = [
        pb.ModelOutput(name=name, data_type=_CONFIG_TYPES[datatype], dims=shape)
        for name, (datatype, shape) in OUTPUTS.items()
    ]
    return pb.ModelConfigResponse(
        config=pb.ModelConfig(
            name=model,
            platform=PLATFORM,
            backend=PLATFORM,
            input=inputs,
            output=outputs,
            model_transaction_policy=pb.ModelTransactionPolicy(decoupled=True),
        )
    )


def encode_statistics(model: str, statistics: Statistics) -> pb.ModelStatisticsResponse:
    """Counts of this process."""
    return pb.ModelStatisticsResponse(
        model_stats=[
            pb.ModelStatistics(
                name=model,
                version=VERSION,
                last_inference=statistics.last_ms,
                inference_count=statistics.succeeded.count,
                execution_count=statistics.succeeded.count,
                inference_stats=pb.InferStatistics(
                    success=_duration(statistics.succeeded), fail=_duration(statistics.failed)
                ),
            )
        ]
    )


def _duration(tally: Tally) -> pb.StatisticDuration:
    return pb.StatisticDuration(count=tally.count, ns=tally.nanoseconds)
