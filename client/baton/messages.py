"""Requests and answers between plain values and protobuf: one implementation for both clients."""

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Unpack

from baton.errors import InvalidRequestError, ProtocolError
from baton.options import GenerateOptions, fill, fill_options
from baton.values import (
    ChatMessage,
    ClusterStatus,
    Completion,
    ExecutorState,
    ExecutorStatus,
    FinishReason,
    ModelInfo,
    Prompt,
    Sample,
    Timings,
    TokenLogprobs,
    TopToken,
    Usage,
)
from baton_protos import generation_pb2 as pb

_FINISH_REASONS = {
    pb.FINISH_REASON_STOP: FinishReason.STOP,
    pb.FINISH_REASON_LENGTH: FinishReason.LENGTH,
    pb.FINISH_REASON_ABORT: FinishReason.ABORT,
    pb.FINISH_REASON_DEADLINE: FinishReason.DEADLINE,
}

_EXECUTOR_STATES = {
    pb.EXECUTOR_STATE_SERVING: ExecutorState.SERVING,
    pb.EXECUTOR_STATE_PAUSED: ExecutorState.PAUSED,
    pb.EXECUTOR_STATE_DRAINING: ExecutorState.DRAINING,
}


def generate_request(prompt: Prompt, **options: Unpack[GenerateOptions]) -> pb.GenerateRequest:
    """Builds the request; for the options see ``GenerateOptions``.

    Raises:
        InvalidRequestError: a value does not fit its field, such as a negative token id; the cluster checks the rest.
        TypeError: there is no such option.
    """
    request = pb.GenerateRequest()
    _set_prompt(request, prompt)
    fill_options(request, options)
    return request


def tokenize_request(prompt: str | Sequence[ChatMessage] | Sequence[Mapping[str, str]]) -> pb.TokenizeRequest:
    """Raises InvalidRequestError for anything but text or chat messages."""
    request = pb.TokenizeRequest()
    if isinstance(prompt, str):
        fill(request, "text", prompt)
    else:
        request.chat.CopyFrom(_chat(prompt))
    return request


def detokenize_request(token_ids: Sequence[int], skip_special_tokens: bool) -> pb.DetokenizeRequest:
    """Raises InvalidRequestError for ids that are no token ids."""
    request = pb.DetokenizeRequest(skip_special_tokens=skip_special_tokens)
    fill(request, "token_ids", token_ids)
    return request


def completion(response: pb.GenerateResponse) -> Completion:
    """Raises ProtocolError when the answer lacks its samples."""
    if [one.index for one in response.samples] != list(range(len(response.samples))) or not response.samples:
        raise ProtocolError(f"the answer has samples {[one.index for one in response.samples]}")
    return Completion(
        samples=tuple(_sample(one) for one in response.samples),
        usage=usage(response.usage),
        prompt_token_ids=tuple(response.prompt_token_ids),
        seed=response.seed,
        request_id=response.request_id,
        model_fingerprint=response.model_fingerprint,
        prompt_logprobs=logprobs(response.prompt_logprobs),
    )


def finish_reason(value: pb.FinishReason) -> FinishReason:
    """Raises ProtocolError for a reason this client does not know."""
    try:
        return _FINISH_REASONS[value]
    except KeyError:
        raise ProtocolError(f"unknown finish reason {value}") from None


def usage(message: pb.Usage) -> Usage:
    return Usage(message.prompt_tokens, message.cached_tokens, message.completion_tokens)


def logprobs(messages: Sequence[pb.TokenLogprobs]) -> tuple[TokenLogprobs, ...]:
    """Raises ProtocolError where the most likely tokens' columns differ in length."""
    return tuple(_token_logprobs(message) for message in messages)


def stop_reason(message: pb.Sample | pb.StreamEnd) -> tuple[str | None, int | None]:
    """The stop string or the stop token that ended a sample."""
    match message.WhichOneof("matched_stop"):
        case "stop_string":
            return message.stop_string, None
        case "stop_token_id":
            return None, message.stop_token_id
        case _:
            return None, None


def timings(message: pb.Sample | pb.StreamEnd) -> Timings | None:
    """None where there are none."""
    if not message.HasField("timings"):
        return None
    sent = message.timings
    return Timings(sent.queue_us, sent.first_token_us, sent.total_us, tuple(sent.batch_us), tuple(sent.batch_tokens))


def model_info(response: pb.GetModelInfoResponse) -> ModelInfo:
    return ModelInfo(
        model=response.model,
        model_fingerprint=response.model_fingerprint,
        architectures=tuple(response.architectures),
        dtype=response.dtype,
        vocab_size=response.vocab_size,
        max_total_tokens=response.max_total_tokens,
        eos_token_ids=tuple(response.eos_token_ids),
        has_chat_template=response.has_chat_template,
    )


def cluster_status(response: pb.GetClusterStatusResponse) -> ClusterStatus:
    executors = tuple(_executor_status(one) for one in response.executors)
    return ClusterStatus(response.scheduler_id, response.queued_requests, executors, response.oldest_queued_us)


def _executor_status(status: pb.ExecutorStatus) -> ExecutorStatus:
    numbers = {field.name: getattr(status, field.name) for field in fields(ExecutorStatus) if field.name != "state"}
    return ExecutorStatus(**numbers, state=_EXECUTOR_STATES.get(status.state, ExecutorState.SERVING))


def _sample(sample: pb.Sample) -> Sample:
    stop_string, stop_token_id = stop_reason(sample)
    return Sample(
        index=sample.index,
        text=sample.text,
        token_ids=tuple(sample.token_ids),
        finish_reason=finish_reason(sample.finish_reason),
        seed=sample.seed,
        logprobs=logprobs(sample.logprobs),
        cumulative_logprob=sample.cumulative_logprob if sample.logprobs else None,
        stop_string=stop_string,
        stop_token_id=stop_token_id,
        timings=timings(sample),
    )


def _token_logprobs(message: pb.TokenLogprobs) -> TokenLogprobs:
    texts = message.top_texts or [""] * len(message.top_token_ids)
    try:
        top = zip(message.top_token_ids, message.top_logprobs, texts, strict=True)
        return TokenLogprobs(
            message.token_id, message.logprob, message.rank, message.text, tuple(TopToken(*one) for one in top)
        )
    except ValueError:
        raise ProtocolError("columns of log probabilities differ in length") from None


def _set_prompt(request: pb.GenerateRequest, prompt: Prompt) -> None:
    if isinstance(prompt, str):
        fill(request, "text", prompt)
    elif len(prompt) > 0 and all(isinstance(turn, (ChatMessage, Mapping)) for turn in prompt):
        request.chat.CopyFrom(_chat(prompt))
    else:
        request.token_ids.SetInParent()  # an empty list of ids is still a list of ids
        fill(request, "token_ids.ids", prompt, blame="token_ids")


def _chat(turns: Sequence[object]) -> pb.ChatMessages:
    chat = pb.ChatMessages()
    for index, turn in enumerate(turns):
        if isinstance(turn, ChatMessage):
            role, content = turn.role, turn.content
        elif isinstance(turn, Mapping) and turn.keys() == {"role", "content"}:
            role, content = turn["role"], turn["content"]
        else:
            raise InvalidRequestError(f"message {index} needs exactly a role and a content, got {turn!r}", field="chat")
        message = chat.messages.add()
        try:
            message.role, message.content = role, content
        except (TypeError, ValueError) as error:
            raise InvalidRequestError(f"chat: message {index}: {str(error).splitlines()[0]}", field="chat") from error
    return chat
