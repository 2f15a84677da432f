"""The one place where requests are checked, whatever entry they came through."""

from dataclasses import dataclass

import grpc
import numpy as np
from numpy.typing import NDArray

from scheduler_service.api.errors import RequestError, invalid, unavailable
from scheduler_service.api.prompts import PromptEncoder
from scheduler_service.api.request import ChatPrompt, GenerationRequest, Prompt, TextPrompt, TokenPrompt


@dataclass(frozen=True)
class RequestLimits:
    """What a request may ask for.

    Attributes:
        model: name of the served model.
        eos_token_ids: the checkpoint's end-of-sequence ids.
        has_tokenizer: whether text can be returned.
        vocab_size: token ids are below it; 0 = not known yet.
        max_total_tokens: largest prompt + output of one request; 0 = no executor has joined yet.
        max_prompt_bytes: largest text, or conversation, in UTF-8 bytes.
    """

    model: str
    eos_token_ids: tuple[int, ...]
    has_tokenizer: bool
    vocab_size: int = 0
    max_total_tokens: int = 0
    max_prompt_bytes: int = 4_000_000
    max_chat_messages: int = 4096
    max_role_chars: int = 64
    max_request_id_chars: int = 128
    max_stop_token_ids: int = 16
    max_temperature: float = 100.0


@dataclass(frozen=True, slots=True)
class ValidatedRequest:
    """What remains of a request once it is known to be sound. ``stop_token_ids`` include end-of-sequence ids."""

    prompt_token_ids: NDArray[np.int32]
    max_tokens: int
    stop_token_ids: tuple[int, ...]
    temperature: float
    top_k: int
    top_p: float
    text: bool


def validate(request: GenerationRequest, limits: RequestLimits, encoder: PromptEncoder) -> ValidatedRequest:
    """Check a request and tokenise its prompt; cheap checks come first. Pure, so it may run on any thread.

    Raises:
        RequestError: INVALID_ARGUMENT naming the field; NOT_FOUND for another model; FAILED_PRECONDITION where the
            checkpoint lacks what the request needs; UNAVAILABLE while no executor has ever joined.
    """
    _check_name(request, limits)
    _check_sampling(request, limits)
    stop_token_ids = _stop_token_ids(request, limits)
    if request.max_tokens is not None and request.max_tokens < 1:
        raise invalid("stop.max_tokens", "must be at least 1")
    if request.text and not limits.has_tokenizer:
        raise RequestError(
            grpc.StatusCode.FAILED_PRECONDITION, "output.text", "the served model has no tokenizer: no text"
        )
    prompt = check_prompt(request.prompt, limits)
    if limits.max_total_tokens == 0:
        raise unavailable("no executor has joined yet")
    token_ids = encode_prompt(prompt, limits, encoder)
    return ValidatedRequest(
        prompt_token_ids=token_ids,
        max_tokens=_max_tokens(request, prompt, len(token_ids), limits),
        stop_token_ids=stop_token_ids,
        temperature=request.temperature,
        top_k=request.top_k,
        top_p=request.top_p,
        text=limits.has_tokenizer if request.text is None else request.text,
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


def _check_name(request: GenerationRequest, limits: RequestLimits) -> None:
    if request.model and request.model != limits.model:
        raise RequestError(grpc.StatusCode.NOT_FOUND, "model", f"the served model is {limits.model!r}")
    if len(request.request_id) > limits.max_request_id_chars or not request.request_id.isprintable():
        raise invalid("request_id", f"must be at most {limits.max_request_id_chars} printable characters")


def _check_sampling(request: GenerationRequest, limits: RequestLimits) -> None:
    # A NaN fails every comparison; `not (a <= x <= b)` refuses it.
    if not 0.0 <= request.temperature <= limits.max_temperature:
        raise invalid("sampling.temperature", f"must be a number from 0 to {limits.max_temperature:g}")
    if not 0.0 < request.top_p <= 1.0:
        raise invalid("sampling.top_p", "must be a number above 0 and at most 1")
    if limits.vocab_size and request.top_k > limits.vocab_size:
        raise invalid("sampling.top_k", f"must not exceed the vocabulary of {limits.vocab_size} ids")


def _stop_token_ids(request: GenerationRequest, limits: RequestLimits) -> tuple[int, ...]:
    field = "stop.stop_token_ids"
    for token_id in request.stop_token_ids:
        if limits.vocab_size and token_id >= limits.vocab_size:
            raise invalid(field, f"token id {token_id} is not in the vocabulary of {limits.vocab_size} ids")
    eos = () if request.ignore_eos else limits.eos_token_ids
    ids = tuple(dict.fromkeys((*eos, *request.stop_token_ids)))
    if len(ids) > limits.max_stop_token_ids:
        raise invalid(field, f"with the end-of-sequence ids there are {len(ids)}, of {limits.max_stop_token_ids}")
    return ids


def _max_tokens(request: GenerationRequest, prompt: Prompt, prompt_tokens: int, limits: RequestLimits) -> int:
    room = limits.max_total_tokens - prompt_tokens
    if room < 1:
        raise _too_long(field_of(prompt), prompt_tokens, limits)
    if request.max_tokens is None:
        return room
    if request.max_tokens > room:
        raise invalid(
            "stop.max_tokens",
            f"{prompt_tokens} prompt tokens and {request.max_tokens} new ones exceed {limits.max_total_tokens} in all",
        )
    return request.max_tokens


def _too_long(field: str, prompt_tokens: int, limits: RequestLimits) -> RequestError:
    return invalid(
        field, f"the prompt's {prompt_tokens} tokens leave no room for output: {limits.max_total_tokens} in all"
    )
