"""Requests of baton.v1 in the words of other dialects; None where those have no words for it."""

import json
from typing import Any

import numpy as np
from smg_grpc_proto.generated import vllm_engine_pb2

from baton_protos import generation_pb2 as pb
from baton_protos import open_inference_pb2

_INT32 = range(-(2**31), 2**31)
# What each has no words for.
_NOT_IN_VLLM = {"resume", "resume_window_ms", "chat", "priority", "cache_salt", "tenant", "queue_timeout_ms"}
_NOT_IN_INFERENCE = {"request_id", "resume", "resume_window_ms", "chat"}


def as_vllm(request: pb.GenerateRequest) -> vllm_engine_pb2.GenerateRequest | None:
    """For a VllmEngine: tokenised where it can be, and streamed."""
    sampling, stop, output = request.sampling, request.stop, request.output
    if _NOT_IN_VLLM & {field.name for field, _ in request.ListFields()}:
        return None
    if sampling.allowed_token_ids or sampling.banned_token_ids or output.logprob_kind:
        return None
    # Zero is how this dialect says that something is not set.
    zeros = ((request, "n"), (sampling, "top_p"), (sampling, "repetition_penalty"))
    if any(message.HasField(name) and not getattr(message, name) for message, name in zeros):
        return None
    params = vllm_engine_pb2.SamplingParams(
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        min_p=sampling.min_p,
        frequency_penalty=sampling.frequency_penalty,
        presence_penalty=sampling.presence_penalty,
        repetition_penalty=sampling.repetition_penalty,
        min_tokens=stop.min_tokens,
        stop=stop.stop_strings,
        stop_token_ids=stop.stop_token_ids,
        ignore_eos=stop.ignore_eos,
        include_stop_str_in_output=stop.include_stop,
        skip_special_tokens=True,
        n=request.n,
        logit_bias=dict(sampling.logit_bias),
    )
    if sampling.HasField("temperature"):
        params.temperature = sampling.temperature
    if stop.HasField("max_tokens"):
        params.max_tokens = stop.max_tokens
    for name in ("logprobs", "prompt_logprobs"):
        if output.HasField(name):
            setattr(params, name, getattr(output, name))
    if sampling.HasField("seed"):
        if sampling.seed not in _INT32:
            return None
        params.seed = sampling.seed
    if sampling.HasField("structured"):
        kind = sampling.structured.WhichOneof("format")
        if kind not in ("json_schema", "regex", "grammar", "json_object"):
            return None
        setattr(params, kind, getattr(sampling.structured, kind))
    message = vllm_engine_pb2.GenerateRequest(request_id=request.request_id, sampling_params=params, stream=True)
    match request.WhichOneof("prompt"):
        case "text":
            message.text = request.text
        case "token_ids":
            message.tokenized.SetInParent()
            message.tokenized.input_ids.extend(request.token_ids.ids)
    return message


def as_inference(request: pb.GenerateRequest, *, raw: bool) -> open_inference_pb2.ModelInferRequest | None:
    """For the Open Inference Protocol: options as JSON, tensors ``raw`` or with typed elements."""
    if _NOT_IN_INFERENCE & {field.name for field, _ in request.ListFields()}:
        return None
    if request.output.logprob_kind or request.output.HasField("prompt_logprobs"):
        return None
    message = open_inference_pb2.ModelInferRequest()
    add_texts(message, "sampling_parameters", [json.dumps(_options(request))], raw=raw)
    match request.WhichOneof("prompt"):
        case "text":
            add_texts(message, "text_input", [request.text], raw=raw)
        case "token_ids":
            ids = list(request.token_ids.ids)
            tensor = message.inputs.add(name="input_ids", datatype="UINT32", shape=[len(ids)])
            if raw:
                message.raw_input_contents.append(np.array(ids, "<u4").tobytes())
            else:
                tensor.contents.uint_contents.extend(ids)
    return message


def _options(request: pb.GenerateRequest) -> dict[str, Any]:
    sampling, stop = request.sampling, request.stop
    options: dict[str, Any] = {}
    for message in (sampling, stop, request.output, request):
        for field, value in message.ListFields():
            if field.message_type is None and not field.is_repeated:
                options[field.name] = value
    options = {name: value for name, value in options.items() if name != "text"}
    if "queue_timeout_ms" in options:
        options["timeout"] = options.pop("queue_timeout_ms") * 1000
    for field in ("allowed_token_ids", "banned_token_ids"):
        if ids := list(getattr(sampling, field)):
            options[field] = ids
    if sampling.logit_bias:
        options["logit_bias"] = dict(sampling.logit_bias)
    if stop.stop_token_ids:
        options["stop_token_ids"] = list(stop.stop_token_ids)
    if stop.stop_strings:
        options["stop"] = list(stop.stop_strings)
    if sampling.HasField("structured"):
        kind = sampling.structured.WhichOneof("format")
        options["structured_outputs"] = {} if kind is None else {kind: getattr(sampling.structured, kind)}
    return options


def add_texts(message: open_inference_pb2.ModelInferRequest, name: str, texts: list[str], *, raw: bool) -> None:
    """Add an input of datatype BYTES."""
    tensor = message.inputs.add(name=name, datatype="BYTES", shape=[len(texts)])
    encoded = [text.encode() for text in texts]
    if raw:
        parts = [len(text).to_bytes(4, "little") + text for text in encoded]
        message.raw_input_contents.append(b"".join(parts))
    else:
        tensor.contents.bytes_contents.extend(encoded)
