"""generation.proto and google.rpc details <-> plain values."""

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from baton_protos import generation_pb2 as pb
from scheduler_service.api.errors import RequestError
from scheduler_service.api.intake import Delta, RunningRequest
from scheduler_service.api.messages import Finish, Outcome
from scheduler_service.api.request import (
    ChatMessage,
    ChatPrompt,
    GenerationRequest,
    Prompt,
    TextPrompt,
    TokenPrompt,
)

_FINISH_REASONS = {
    Outcome.STOP: pb.FINISH_REASON_STOP,
    Outcome.LENGTH: pb.FINISH_REASON_LENGTH,
    Outcome.ABORT: pb.FINISH_REASON_ABORT,
}


def decode_request(message: pb.GenerateRequest) -> GenerationRequest:
    """A Generate or GenerateStream request, with the defaults filled in."""
    sampling, stop, output = message.sampling, message.stop, message.output
    return GenerationRequest(
        prompt=decode_prompt(message),
        request_id=message.request_id,
        model=message.model,
        temperature=sampling.temperature if sampling.HasField("temperature") else 1.0,
        top_k=sampling.top_k,
        top_p=sampling.top_p if sampling.HasField("top_p") else 1.0,
        seed=sampling.seed if sampling.HasField("seed") else None,
        max_tokens=stop.max_tokens if stop.HasField("max_tokens") else None,
        stop_token_ids=tuple(stop.stop_token_ids),
        ignore_eos=stop.ignore_eos,
        text=output.text if output.HasField("text") else None,
        echo_prompt=output.prompt_token_ids if output.HasField("prompt_token_ids") else True,
        skip_special_tokens=output.skip_special_tokens if output.HasField("skip_special_tokens") else True,
    )


def decode_prompt(message: pb.GenerateRequest | pb.TokenizeRequest) -> Prompt | None:
    """The prompt of a request; None if it has none."""
    match message.WhichOneof("prompt"):
        case "text":
            return TextPrompt(message.text)
        case "chat":
            chat = message.chat
            messages = tuple(ChatMessage(item.role, item.content) for item in chat.messages)
            prompted = chat.add_generation_prompt if chat.HasField("add_generation_prompt") else True
            return ChatPrompt(messages, prompted)
        case "token_ids" if isinstance(message, pb.GenerateRequest):
            return TokenPrompt(message.token_ids.ids)
        case _:
            return None


def encode_start(running: RunningRequest, *, echo_prompt: bool) -> pb.GenerateStreamResponse:
    """A stream's first message."""
    start = pb.StreamStart(
        request_id=running.request_id,
        seed=running.seed,
        model_fingerprint=running.model_fingerprint,
        prompt_token_ids=running.prompt_token_ids() if echo_prompt else (),
        prompt_tokens=running.prompt_length,
    )
    return pb.GenerateStreamResponse(start=start)


def encode_chunk(delta: Delta) -> pb.GenerateStreamResponse:
    """Tokens and text of a stream."""
    chunk = pb.StreamChunk(
        token_index=delta.token_index, token_ids=delta.token_ids, text=delta.text, text_offset=delta.text_offset
    )
    return pb.GenerateStreamResponse(chunk=chunk)


def encode_end(running: RunningRequest, finish: Finish) -> pb.GenerateStreamResponse:
    """A stream's last message."""
    end = pb.StreamEnd(finish_reason=_FINISH_REASONS[finish.outcome], usage=_usage(running, finish))
    return pb.GenerateStreamResponse(end=end)


def encode_response(running: RunningRequest, delta: Delta, finish: Finish, *, echo_prompt: bool) -> pb.GenerateResponse:
    """The answer to Generate."""
    sample = pb.Sample(text=delta.text, token_ids=delta.token_ids, finish_reason=_FINISH_REASONS[finish.outcome])
    return pb.GenerateResponse(
        request_id=running.request_id,
        seed=running.seed,
        model_fingerprint=running.model_fingerprint,
        prompt_token_ids=running.prompt_token_ids() if echo_prompt else (),
        samples=[sample],
        usage=_usage(running, finish),
    )


def encode_error(error: RequestError) -> grpc.Status:
    """The gRPC status of an error, with google.rpc details: BadRequest names the field, RetryInfo the delay."""
    details = []
    if error.field:
        violation = error_details_pb2.BadRequest.FieldViolation(field=error.field, description=error.message)
        details.append(error_details_pb2.BadRequest(field_violations=[violation]))
    if error.retry_after is not None:
        delay = duration_pb2.Duration()
        delay.FromMilliseconds(round(error.retry_after * 1000))
        details.append(error_details_pb2.RetryInfo(retry_delay=delay))
    message = f"{error.field}: {error.message}" if error.field else error.message
    status = status_pb2.Status(code=error.status.value[0], message=message)
    for detail in details:
        packed = any_pb2.Any()
        packed.Pack(detail)
        status.details.append(packed)
    return rpc_status.to_status(status)


def _usage(running: RunningRequest, finish: Finish) -> pb.Usage:
    return pb.Usage(
        prompt_tokens=running.prompt_length,
        cached_tokens=finish.cached_tokens,
        completion_tokens=running.num_tokens,
    )
