"""The one place where requests are checked, whatever entry they came through."""

from dataclasses import dataclass

import grpc
import numpy as np
from numpy.typing import NDArray

from scheduler_service.api.errors import RequestError, invalid, unavailable
from scheduler_service.api.prompts import PromptEncoder
from scheduler_service.api.request import ChatPrompt, GenerationRequest, Prompt, TextPrompt, TokenPrompt
from scheduler_service.api.rules import RequestLimits, check_rules, stop_token_ids


@dataclass(frozen=True, slots=True)
class ValidatedRequest:
    """A sound request.

    Attributes:
        request: as the caller made it.
        prompt_token_ids: int32 [P], not empty.
        max_tokens: most output tokens of a sample.
        stop_token_ids: ids that end a sample, those of the checkpoint included.
        text: whether text is returned.
    """

    request: GenerationRequest
    prompt_token_ids: NDArray[np.int32]
    max_tokens: int
    stop_token_ids: tuple[int, ...]
    text: bool


def validate(request: GenerationRequest, limits: RequestLimits, encoder: PromptEncoder) -> ValidatedRequest:
    """Check a request and tokenise its prompt; cheap checks come first. Pure, so it may run on any thread.

    Raises:
        RequestError: INVALID_ARGUMENT naming the field; NOT_FOUND for another model; FAILED_PRECONDITION where the
            checkpoint lacks what the request needs; UNAVAILABLE while no executor has ever joined.
    """
    if request.model and request.model != limits.model:
        raise RequestError(grpc.StatusCode.NOT_FOUND, "model", f"the served model is {limits.model!r}")
    check_rules(request, limits)
    if not limits.has_tokenizer:
        _check_no_text(request)
    prompt = check_prompt(request.prompt, limits)
    if limits.max_total_tokens == 0:
        raise unavailable("no executor has joined yet")
    token_ids = encode_prompt(prompt, limits, encoder)
    max_tokens = _max_tokens(request, prompt, len(token_ids), limits)
    if any(len(point.token_ids) > max_tokens for point in request.resume):
        raise invalid("resume", f"a point has more token ids than the {max_tokens} that a sample may have")
    return ValidatedRequest(
        request=request,
        prompt_token_ids=token_ids,
        max_tokens=max_tokens,
        stop_token_ids=stop_token_ids(request, limits),
        text=limits.has_tokenizer if request.output.text is None else request.output.text,
    )


def check_prompt(prompt: Prompt | None, limits: RequestLimits) -> Prompt:
    """The prompt, if there is one of a bearable size.

    Raises:
        RequestError: INVALID_ARGUMENT naming the prompt's field.
    """
    match prompt:
        case None:
            raise invalid("prompt", "one of text, token_ids and chat must be set")
        case TextPrompt(text):
            if not text:
                raise invalid("text", "must not be empty")
        case ChatPrompt():
            _check_chat(prompt, limits)
        case TokenPrompt(ids):
            if not ids:
                raise invalid("token_ids", "must not be empty")
            if 0 < limits.max_total_tokens <= len(ids):
                raise _too_long("token_ids", len(ids), limits)
    if not isinstance(prompt, TokenPrompt):
        size = prompt_bytes(prompt)
        if size > limits.max_prompt_bytes:
            field = field_of(prompt)
            raise invalid(field, f"is {size} bytes long; at most {limits.max_prompt_bytes} bytes are allowed")
    return prompt


def encode_prompt(prompt: Prompt, limits: RequestLimits, encoder: PromptEncoder) -> NDArray[np.int32]:
    """Token ids of a checked prompt: not empty, and all in the vocabulary.

    Raises:
        RequestError: INVALID_ARGUMENT naming the prompt's field, or as PromptEncoder.encode.
    """
    field = field_of(prompt)
    token_ids = encoder.encode(prompt, limits.max_prompt_bytes)
    if not len(token_ids):
        raise invalid(field, "has no tokens")
    largest = int(token_ids.max())
    if limits.vocab_size and largest >= limits.vocab_size:
        raise invalid(field, f"token id {largest} is not in the vocabulary of {limits.vocab_size} ids")
    return token_ids.astype(np.int32)


def field_of(prompt: Prompt) -> str:
    """The field of the request message that holds this kind of prompt."""
    match prompt:
        case TextPrompt():
            return "text"
        case ChatPrompt():
            return "chat"
        case TokenPrompt():
            return "token_ids"


def prompt_bytes(prompt: Prompt | None) -> int:
    """Size of a prompt: UTF-8 bytes of its text, or one per token id."""
    match prompt:
        case None:
            return 0
        case TextPrompt(text):
            return _utf8_bytes(text)
        case ChatPrompt(messages):
            return sum(_utf8_bytes(message.content) for message in messages)
        case TokenPrompt(ids):
            return len(ids)


def _utf8_bytes(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode())


def _check_chat(prompt: ChatPrompt, limits: RequestLimits) -> None:
    if not prompt.messages:
        raise invalid("chat", "must have at least one message")
    if len(prompt.messages) > limits.max_chat_messages:
        raise invalid("chat", f"has more than {limits.max_chat_messages} messages")
    for index, message in enumerate(prompt.messages):
        if not message.role or len(message.role) > limits.max_role_chars:
            raise invalid("chat", f"messages[{index}].role must have 1 to {limits.max_role_chars} characters")


def _check_no_text(request: GenerationRequest) -> None:
    for field, wanted in (("output.text", request.output.text), ("stop.stop_strings", request.stop.stop_strings)):
        if wanted:
            message = "the served model has no tokenizer: no text"
            raise RequestError(grpc.StatusCode.FAILED_PRECONDITION, field, message)


def _max_tokens(request: GenerationRequest, prompt: Prompt, prompt_tokens: int, limits: RequestLimits) -> int:
    room = limits.max_total_tokens - prompt_tokens
    if room < 1:
        raise _too_long(field_of(prompt), prompt_tokens, limits)
    wanted = room if request.stop.max_tokens is None else request.stop.max_tokens
    if wanted > room:
        raise invalid(
            "stop.max_tokens",
            f"{prompt_tokens} prompt tokens and {wanted} new ones exceed {limits.max_total_tokens} in all",
        )
    if request.stop.min_tokens > wanted:
        raise invalid("stop.min_tokens", f"only {wanted} tokens fit behind the prompt's {prompt_tokens}")
    return wanted


def _too_long(field: str, prompt_tokens: int, limits: RequestLimits) -> RequestError:
    return invalid(
        field, f"the prompt's {prompt_tokens} tokens leave no room for output: {limits.max_total_tokens} in all"
    )
