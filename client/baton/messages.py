"""Requests and answers between plain values and protobuf: one implementation for both clients."""

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import TypedDict

from baton.errors import InvalidRequestError, ProtocolError
from baton.values import (
    ChatMessage,
    ClusterStatus,
    Completion,
    ExecutorStatus,
    FinishReason,
    ModelInfo,
    Prompt,
    Usage,
)
from baton_protos import generation_pb2 as pb

_FINISH_REASONS = {
    pb.FINISH_REASON_STOP: FinishReason.STOP,
    pb.FINISH_REASON_LENGTH: FinishReason.LENGTH,
    pb.FINISH_REASON_ABORT: FinishReason.ABORT,
}


class GenerateOptions(TypedDict, total=False):
    """Everything of a request but its prompt; what is left out is the cluster's choice.

    Keys:
        max_tokens: most tokens to generate; default: as many as the context and the cluster's memory allow.
        temperature: 0 = greedy; default 1.
        top_k: sample among the k most likely tokens; default 0 = all.
        top_p: sample among the most likely tokens that together reach this probability, in (0, 1]; default 1.
        seed: same seed, same request: same tokens; default: drawn by the scheduler, and returned.
        stop_token_ids: end at these ids too, at most 16.
        ignore_eos: go on past the checkpoint's end-of-sequence ids.
        request_id: a name for ``abort`` and logs, at most 128 characters; default: drawn by the scheduler.
        model: the name of the served model, to be sure of it; default: whichever is served.
    """

    max_tokens: int | None
    temperature: float | None
    top_k: int | None
    top_p: float | None
    seed: int | None
    stop_token_ids: Sequence[int]
    ignore_eos: bool
    request_id: str
    model: str


def generate_request(
    prompt: Prompt,
    *,
    max_tokens: int | None = None,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = None,
    stop_token_ids: Sequence[int] = (),
    ignore_eos: bool = False,
    request_id: str = "",
    model: str = "",
) -> pb.GenerateRequest:
    """Builds the request; for the options see ``GenerateOptions``.

    Raises:
        InvalidRequestError: a value does not fit its field, such as a negative token id; the cluster checks the rest.
    """
    request = pb.GenerateRequest()
    _fill("request_id", request, "request_id", request_id)
    _fill("model", request, "model", model)
    _set_prompt(request, prompt)
    sampling = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed}
    for name, value in sampling.items():
        if value is not None:
            _fill(f"sampling.{name}", request.sampling, name, value)
    if max_tokens is not None:
        _fill("stop.max_tokens", request.stop, "max_tokens", max_tokens)
    _extend("stop.stop_token_ids", request.stop.stop_token_ids, stop_token_ids)
    _fill("stop.ignore_eos", request.stop, "ignore_eos", ignore_eos)
    return request


def tokenize_request(prompt: str | Sequence[ChatMessage] | Sequence[Mapping[str, str]]) -> pb.TokenizeRequest:
    """Raises InvalidRequestError for anything but text or chat messages."""
    request = pb.TokenizeRequest()
    if isinstance(prompt, str):
        _fill("text", request, "text", prompt)
    else:
        request.chat.CopyFrom(_chat(prompt))
    return request


def detokenize_request(token_ids: Sequence[int], skip_special_tokens: bool) -> pb.DetokenizeRequest:
    """Raises InvalidRequestError for ids that are no token ids."""
    request = pb.DetokenizeRequest(skip_special_tokens=skip_special_tokens)
    _extend("token_ids", request.token_ids, token_ids)
    return request


def completion(response: pb.GenerateResponse) -> Completion:
    """Raises ProtocolError when the answer lacks its one sample."""
    if len(response.samples) != 1:
        raise ProtocolError(f"expected one sample, the answer has {len(response.samples)}")
    sample = response.samples[0]
    return Completion(
        text=sample.text,
        token_ids=tuple(sample.token_ids),
        finish_reason=finish_reason(sample.finish_reason),
        usage=usage(response.usage),
        prompt_token_ids=tuple(response.prompt_token_ids),
        seed=response.seed,
        request_id=response.request_id,
        model_fingerprint=response.model_fingerprint,
    )


def finish_reason(value: pb.FinishReason) -> FinishReason:
    """Raises ProtocolError for a reason this client does not know."""
    try:
        return _FINISH_REASONS[value]
    except KeyError:
        raise ProtocolError(f"unknown finish reason {value}") from None


def usage(message: pb.Usage) -> Usage:
    return Usage(message.prompt_tokens, message.cached_tokens, message.completion_tokens)


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
    names = [field.name for field in fields(ExecutorStatus)]
    executors = tuple(ExecutorStatus(**{name: getattr(one, name) for name in names}) for one in response.executors)
    return ClusterStatus(response.scheduler_id, response.queued_requests, executors)


def _set_prompt(request: pb.GenerateRequest, prompt: Prompt) -> None:
    if isinstance(prompt, str):
        _fill("text", request, "text", prompt)
    elif len(prompt) > 0 and all(isinstance(turn, (ChatMessage, Mapping)) for turn in prompt):
        request.chat.CopyFrom(_chat(prompt))
    else:
        request.token_ids.SetInParent()  # an empty list of ids is still a list of ids
        _extend("token_ids", request.token_ids.ids, prompt)


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
        _fill("chat", message, "role", role)
        _fill("chat", message, "content", content)
    return chat


def _fill(field: str, message: object, name: str, value: object) -> None:
    try:
        setattr(message, name, value)
    except (TypeError, ValueError) as error:
        raise InvalidRequestError(f"{field}: {_reason(error)}", field=field) from error


def _extend(field: str, repeated: object, values: object) -> None:
    try:
        repeated.extend(values)  # type: ignore[attr-defined]
    except (TypeError, ValueError) as error:
        raise InvalidRequestError(f"{field}: {_reason(error)}", field=field) from error


def _reason(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
