"""generation.proto and google.rpc details <-> plain values."""

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from baton_protos import generation_pb2 as pb
from scheduler_service.api import output
from scheduler_service.api.errors import RequestError, invalid
from scheduler_service.api.output import Delta, Ending, FinishReason
from scheduler_service.api.request import (
    ChatMessage,
    ChatPrompt,
    GenerationRequest,
    OutputOptions,
    Prompt,
    ResumePoint,
    Sampling,
    StopConditions,
    StructuredKind,
    StructuredOutput,
    TextPrompt,
    TokenPrompt,
)
from scheduler_service.api.rules import RequestLimits, few
from scheduler_service.api.running_request import RunningRequest

_FINISH_REASONS = {
    FinishReason.STOP: pb.FINISH_REASON_STOP,
    FinishReason.LENGTH: pb.FINISH_REASON_LENGTH,
    FinishReason.ABORT: pb.FINISH_REASON_ABORT,
    FinishReason.DEADLINE: pb.FINISH_REASON_DEADLINE,
}
_PUSH_BACK = ("grpc-retry-pushback-ms", "-1")


def decode_request(message: pb.GenerateRequest) -> GenerationRequest:
    """A Generate or GenerateStream request, with the defaults filled in.

    Raises:
        RequestError: INVALID_ARGUMENT, a field has no meaning to this scheduler.
    """
    return GenerationRequest(
        prompt=decode_prompt(message),
        request_id=message.request_id,
        model=message.model,
        sampling=_decode_sampling(message.sampling),
        stop=_decode_stop(message.stop),
        output=_decode_output(message.output),
        n=message.n if message.HasField("n") else 1,
        priority=message.priority,
        tenant=message.tenant,
        cache_salt=message.cache_salt,
        queue_timeout_ms=message.queue_timeout_ms,
        resume=tuple(
            ResumePoint(point.sample, point.token_ids, point.text_offset)
            for point in few("resume", message.resume, RequestLimits.max_samples)
        ),
        resume_window_ms=message.resume_window_ms,
    )


def _decode_sampling(sampling: pb.SamplingParams) -> Sampling:
    return Sampling(
        temperature=sampling.temperature if sampling.HasField("temperature") else 1.0,
        top_k=sampling.top_k,
        top_p=sampling.top_p if sampling.HasField("top_p") else 1.0,
        min_p=sampling.min_p,
        repetition_penalty=sampling.repetition_penalty if sampling.HasField("repetition_penalty") else 1.0,
        frequency_penalty=sampling.frequency_penalty,
        presence_penalty=sampling.presence_penalty,
        seed=sampling.seed if sampling.HasField("seed") else None,
        logit_bias=dict(few("sampling.logit_bias", sampling.logit_bias, RequestLimits.max_biased_token_ids)),
        # Not copied: how many there are is still to be checked.
        allowed_token_ids=sampling.allowed_token_ids,
        banned_token_ids=sampling.banned_token_ids,
        structured=_decode_structured(sampling.structured) if sampling.HasField("structured") else None,
    )


def _decode_structured(structured: pb.StructuredOutput) -> StructuredOutput | None:
    match structured.WhichOneof("format"):
        case "json_object":
            return StructuredOutput(StructuredKind.JSON_OBJECT) if structured.json_object else None
        case "choice":
            texts = few("sampling.structured.choice", structured.choice.texts, RequestLimits.max_choices)
            return StructuredOutput(StructuredKind.CHOICE, tuple(texts))
        case None:
            raise invalid("sampling.structured", "one of its formats must be set")
        case kind:
            return StructuredOutput(StructuredKind(kind), (getattr(structured, kind),))


def _decode_stop(stop: pb.StopConditions) -> StopConditions:
    return StopConditions(
        max_tokens=stop.max_tokens if stop.HasField("max_tokens") else None,
        stop_token_ids=tuple(few("stop.stop_token_ids", stop.stop_token_ids, RequestLimits.max_listed_token_ids)),
        ignore_eos=stop.ignore_eos,
        stop_strings=tuple(few("stop.stop_strings", stop.stop_strings, RequestLimits.max_stop_strings)),
        include_stop=stop.include_stop,
        min_tokens=stop.min_tokens,
        deadline_unix_ms=stop.deadline_unix_ms,
    )


def _decode_output(options: pb.OutputOptions) -> OutputOptions:
    if options.logprob_kind not in pb.LogprobKind.values():
        raise invalid("output.logprob_kind", f"there is no kind {options.logprob_kind}")
    return OutputOptions(
        text=options.text if options.HasField("text") else None,
        prompt_token_ids=options.prompt_token_ids if options.HasField("prompt_token_ids") else True,
        skip_special_tokens=options.skip_special_tokens if options.HasField("skip_special_tokens") else True,
        logprobs=options.logprobs if options.HasField("logprobs") else None,
        prompt_logprobs=options.prompt_logprobs if options.HasField("prompt_logprobs") else None,
        processed_logprobs=options.logprob_kind == pb.LOGPROB_KIND_PROCESSED,
        timings=options.timings,
    )


def decode_prompt(message: pb.GenerateRequest | pb.TokenizeRequest) -> Prompt | None:
    """The prompt of a request; None if it has none.

    Raises:
        RequestError: INVALID_ARGUMENT, a conversation of too many messages.
    """
    match message.WhichOneof("prompt"):
        case "text":
            return TextPrompt(message.text)
        case "chat":
            chat = message.chat
            counted = few("chat", chat.messages, RequestLimits.max_chat_messages)
            messages = tuple(ChatMessage(item.role, item.content) for item in counted)
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
        sample_seeds=running.sample_seeds,
        scheduler_id=running.scheduler_id,
    )
    return pb.GenerateStreamResponse(start=start)


def encode_delta(delta: Delta) -> list[pb.GenerateStreamResponse]:
    """A stream's messages for what is new in a sample."""
    messages = []
    if delta.prompt_logprobs is not None:
        prompt = pb.StreamPromptLogprobs(logprobs=map(_logprobs, delta.prompt_logprobs))
        messages.append(pb.GenerateStreamResponse(prompt_logprobs=prompt))
    if delta.has_content:
        messages.append(pb.GenerateStreamResponse(chunk=_chunk(delta)))
    if delta.ending is not None:
        messages.append(pb.GenerateStreamResponse(end=_end(delta.sample, delta.ending)))
    return messages


def encode_response(running: RunningRequest, samples: list[Delta], *, echo_prompt: bool) -> pb.GenerateResponse:
    """The answer to Generate, from the whole output of every sample."""
    endings = [delta.ending for delta in samples if delta.ending is not None]
    return pb.GenerateResponse(
        request_id=running.request_id,
        seed=running.seed,
        model_fingerprint=running.model_fingerprint,
        prompt_token_ids=running.prompt_token_ids() if echo_prompt else (),
        samples=[
            _sample(delta, ending, seed)
            for delta, ending, seed in zip(samples, endings, running.sample_seeds, strict=True)
        ],
        usage=_usage(output.total_usage(endings)),
        prompt_logprobs=map(_logprobs, samples[0].prompt_logprobs or ()),
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
    result = rpc_status.to_status(status)
    if error.push_back:
        result = result._replace(trailing_metadata=(*result.trailing_metadata, _PUSH_BACK))
    return result


def _chunk(delta: Delta) -> pb.StreamChunk:
    return pb.StreamChunk(
        sample=delta.sample,
        token_index=delta.token_index,
        token_ids=delta.token_ids,
        text=delta.text,
        text_offset=delta.text_offset,
        logprobs=map(_logprobs, delta.logprobs),
        chunk_index=delta.chunk_index,
        best_effort_continuation=delta.best_effort,
    )


def _end(sample: int, ending: Ending) -> pb.StreamEnd:
    return pb.StreamEnd(
        sample=sample,
        finish_reason=_FINISH_REASONS[ending.reason],
        usage=_usage(ending.usage),
        stop_string=ending.stop_string,
        stop_token_id=ending.stop_token_id,
        cumulative_logprob=ending.cumulative_logprob,
        timings=_timings(ending.timings),
    )


def _sample(delta: Delta, ending: Ending, seed: int) -> pb.Sample:
    return pb.Sample(
        index=delta.sample,
        text=delta.text,
        token_ids=delta.token_ids,
        finish_reason=_FINISH_REASONS[ending.reason],
        logprobs=map(_logprobs, delta.logprobs),
        cumulative_logprob=ending.cumulative_logprob,
        stop_string=ending.stop_string,
        stop_token_id=ending.stop_token_id,
        timings=_timings(ending.timings),
        seed=seed,
    )


def _logprobs(logprobs: output.TokenLogprobs) -> pb.TokenLogprobs:
    return pb.TokenLogprobs(
        token_id=logprobs.token_id,
        logprob=logprobs.logprob,
        rank=logprobs.rank,
        top_token_ids=logprobs.top_token_ids,
        top_logprobs=logprobs.top_logprobs,
        text=logprobs.text,
        top_texts=logprobs.top_texts,
    )


def _timings(timings: output.Timings | None) -> pb.Timings | None:
    if timings is None:
        return None
    return pb.Timings(
        queue_us=timings.queue_us,
        first_token_us=timings.first_token_us,
        total_us=timings.total_us,
        batch_us=timings.batch_us,
        batch_tokens=timings.batch_tokens,
    )


def _usage(usage: output.Usage) -> pb.Usage:
    return pb.Usage(
        prompt_tokens=usage.prompt_tokens,
        cached_tokens=usage.cached_tokens,
        completion_tokens=usage.completion_tokens,
    )
