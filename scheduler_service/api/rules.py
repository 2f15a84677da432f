"""What a request may ask for: the limits, and one table of what holds for its fields."""

from collections.abc import Callable, Iterable, Sequence, Sized
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from scheduler_service.api.errors import invalid
from scheduler_service.api.request import GenerationRequest

# Some dialects have wider numbers than executors compute with: what is smaller would be 0 there.
_SMALLEST = float(np.finfo(np.float32).tiny)

_Many = TypeVar("_Many", bound=Sized)


def _bound(value: float) -> float:
    """A lower bound as callers send it, in 32 bits; these may lie just below it."""
    return float(np.float32(value))


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
        min_temperature, min_repetition_penalty: logits are divided by them; 0 is a temperature, too.
        max_name_chars: of a request id, a tenant and a cache salt.
        max_stop_token_ids: with the end-of-sequence ids.
        max_listed_token_ids: allowed ids, and banned ones.
        max_choices: texts to choose the output from.
    """

    model: str
    eos_token_ids: tuple[int, ...]
    has_tokenizer: bool
    vocab_size: int = 0
    max_total_tokens: int = 0
    max_prompt_bytes: int = 4_000_000
    max_chat_messages: int = 4096
    max_role_chars: int = 64
    max_name_chars: int = 128
    max_samples: int = 64
    max_priority: int = 1000
    max_queue_timeout_ms: int = 24 * 3_600_000
    max_resume_window_ms: int = 600_000
    min_temperature: float = _bound(1e-4)
    max_temperature: float = 100.0
    min_repetition_penalty: float = _bound(0.01)
    max_repetition_penalty: float = 10.0
    max_penalty: float = 2.0
    max_bias: float = 100.0
    max_biased_token_ids: int = 1024
    max_listed_token_ids: int = 16_384
    max_stop_token_ids: int = 16
    max_stop_strings: int = 16
    max_stop_string_chars: int = 256
    max_choices: int = 1024
    max_logprobs: int = 20


@dataclass(frozen=True, slots=True)
class Rule:
    """Something that must hold for a request.

    Attributes:
        field: who is to blame if it does not: a path in GenerateRequest.
        holds: whether it does. A NaN fails every comparison, so bounds are written as what must be true.
        message: what the caller is told, with names of RequestLimits in braces.
    """

    field: str
    holds: Callable[[GenerationRequest, RequestLimits], bool]
    message: str


RULES = (
    Rule(
        "request_id",
        lambda request, limits: len(request.request_id) <= limits.max_name_chars and request.request_id.isprintable(),
        "must be at most {max_name_chars} printable characters",
    ),
    Rule(
        "tenant",
        lambda request, limits: len(request.tenant) <= limits.max_name_chars and request.tenant.isprintable(),
        "must be at most {max_name_chars} printable characters",
    ),
    Rule(
        "cache_salt",
        lambda request, limits: len(request.cache_salt) <= limits.max_name_chars,
        "must be at most {max_name_chars} characters",
    ),
    Rule("n", lambda request, limits: 1 <= request.n <= limits.max_samples, "must be from 1 to {max_samples}"),
    Rule(
        "priority",
        lambda request, limits: -limits.max_priority <= request.priority <= limits.max_priority,
        "must be from -{max_priority} to {max_priority}",
    ),
    Rule(
        "queue_timeout_ms",
        lambda request, limits: 0 <= request.queue_timeout_ms <= limits.max_queue_timeout_ms,
        "must be from 0 to {max_queue_timeout_ms}",
    ),
    Rule(
        "resume_window_ms",
        lambda request, limits: 0 <= request.resume_window_ms <= limits.max_resume_window_ms,
        "must be from 0 to {max_resume_window_ms}",
    ),
    Rule(
        "request_id",
        lambda request, limits: bool(request.request_id) or not request.resume_window_ms,
        "must be set for a resume window: a retry is known by it",
    ),
    Rule(
        "sampling.temperature",
        lambda request, limits: (
            request.sampling.temperature == 0.0
            or limits.min_temperature <= request.sampling.temperature <= limits.max_temperature
        ),
        "must be 0, or a number from {min_temperature:g} to {max_temperature:g}",
    ),
    Rule(
        "sampling.top_k",
        lambda request, limits: 0 <= request.sampling.top_k <= (limits.vocab_size or request.sampling.top_k),
        "must not exceed the vocabulary of {vocab_size} ids",
    ),
    Rule(
        "sampling.top_p",
        lambda request, limits: _SMALLEST <= request.sampling.top_p <= 1.0,
        "must be a number above 0 and at most 1",
    ),
    Rule(
        "sampling.min_p",
        lambda request, limits: 0.0 <= request.sampling.min_p <= 1.0,
        "must be a number from 0 to 1",
    ),
    Rule(
        "sampling.repetition_penalty",
        lambda request, limits: (
            limits.min_repetition_penalty <= request.sampling.repetition_penalty <= limits.max_repetition_penalty
        ),
        "must be a number from {min_repetition_penalty:g} to {max_repetition_penalty:g}",
    ),
    Rule(
        "sampling.frequency_penalty",
        lambda request, limits: abs(request.sampling.frequency_penalty) <= limits.max_penalty,
        "must be a number from -{max_penalty:g} to {max_penalty:g}",
    ),
    Rule(
        "sampling.presence_penalty",
        lambda request, limits: abs(request.sampling.presence_penalty) <= limits.max_penalty,
        "must be a number from -{max_penalty:g} to {max_penalty:g}",
    ),
    Rule(
        "sampling.seed",
        lambda request, limits: request.sampling.seed is None or 0 <= request.sampling.seed < 1 << 64,
        "must be from 0 to 2^64 - 1",
    ),
    Rule(
        "sampling.logit_bias",
        lambda request, limits: len(request.sampling.logit_bias) <= limits.max_biased_token_ids,
        "has more than {max_biased_token_ids} ids",
    ),
    Rule(
        "sampling.logit_bias",
        lambda request, limits: _in_vocabulary(request.sampling.logit_bias, limits),
        "has an id that is not in the vocabulary of {vocab_size} ids",
    ),
    Rule(
        "sampling.logit_bias",
        lambda request, limits: all(abs(bias) <= limits.max_bias for bias in request.sampling.logit_bias.values()),
        "must be numbers from -{max_bias:g} to {max_bias:g}",
    ),
    Rule(
        "sampling.allowed_token_ids",
        lambda request, limits: len(request.sampling.allowed_token_ids) <= limits.max_listed_token_ids,
        "has more than {max_listed_token_ids} ids",
    ),
    Rule(
        "sampling.allowed_token_ids",
        lambda request, limits: _in_vocabulary(request.sampling.allowed_token_ids, limits),
        "has an id that is not in the vocabulary of {vocab_size} ids",
    ),
    Rule(
        "sampling.banned_token_ids",
        lambda request, limits: len(request.sampling.banned_token_ids) <= limits.max_listed_token_ids,
        "has more than {max_listed_token_ids} ids",
    ),
    Rule(
        "sampling.banned_token_ids",
        lambda request, limits: _in_vocabulary(request.sampling.banned_token_ids, limits),
        "has an id that is not in the vocabulary of {vocab_size} ids",
    ),
    Rule(
        "sampling.banned_token_ids",
        lambda request, limits: _something_is_left(request, limits, request.sampling.banned_token_ids),
        "leaves no id that may be sampled",
    ),
    Rule(
        "stop.max_tokens",
        lambda request, limits: request.stop.max_tokens is None or request.stop.max_tokens >= 1,
        "must be at least 1",
    ),
    Rule(
        "stop.stop_token_ids",
        lambda request, limits: _in_vocabulary(request.stop.stop_token_ids, limits),
        "has an id that is not in the vocabulary of {vocab_size} ids",
    ),
    Rule(
        "stop.stop_token_ids",
        lambda request, limits: len(stop_token_ids(request, limits)) <= limits.max_stop_token_ids,
        "has, with the end-of-sequence ids, more than {max_stop_token_ids} ids",
    ),
    Rule(
        "stop.stop_strings",
        lambda request, limits: len(request.stop.stop_strings) <= limits.max_stop_strings,
        "has more than {max_stop_strings} texts",
    ),
    Rule(
        "stop.stop_strings",
        lambda request, limits: all(
            1 <= len(text) <= limits.max_stop_string_chars for text in request.stop.stop_strings
        ),
        "must have 1 to {max_stop_string_chars} characters each",
    ),
    Rule(
        "stop.min_tokens",
        lambda request, limits: 0 <= request.stop.min_tokens <= (request.stop.max_tokens or request.stop.min_tokens),
        "must be from 0 to max_tokens",
    ),
    Rule(
        "stop.min_tokens",
        lambda request, limits: (
            request.stop.min_tokens == 0
            or _something_is_left(
                request, limits, (*request.sampling.banned_token_ids, *stop_token_ids(request, limits))
            )
        ),
        "leaves no id that may be sampled before min_tokens",
    ),
    Rule("stop.deadline_unix_ms", lambda request, limits: request.stop.deadline_unix_ms >= 0, "must not be negative"),
    Rule(
        "output.logprobs",
        lambda request, limits: 0 <= (request.output.logprobs or 0) <= limits.max_logprobs,
        "must be from 0 to {max_logprobs}",
    ),
    Rule(
        "output.prompt_logprobs",
        lambda request, limits: 0 <= (request.output.prompt_logprobs or 0) <= limits.max_logprobs,
        "must be from 0 to {max_logprobs}",
    ),
    Rule(
        "resume",
        lambda request, limits: (
            len({point.sample for point in request.resume}) == len(request.resume)
            and all(0 <= point.sample < request.n for point in request.resume)
        ),
        "must have at most one point for each of the n samples",
    ),
    Rule(
        "resume",
        lambda request, limits: all(_in_vocabulary(point.token_ids, limits) for point in request.resume),
        "has an id that is not in the vocabulary of {vocab_size} ids",
    ),
    Rule(
        "sampling.seed",
        lambda request, limits: (
            request.sampling.seed is not None or not any(point.token_ids for point in request.resume)
        ),
        "must be set to resume: it is in the first message of the stream",
    ),
)


def check_rules(request: GenerationRequest, limits: RequestLimits) -> None:
    """Check everything that does not depend on the prompt.

    Raises:
        RequestError: INVALID_ARGUMENT naming the field of the first rule that does not hold.
    """
    for rule in RULES:
        if not rule.holds(request, limits):
            raise invalid(rule.field, rule.message.format_map(vars(limits)))


def few(field: str, items: _Many, most: int) -> _Many:
    """``items`` of a message as it came; they become values of ours one by one, on the event loop, many times as large,
    so they are counted before that.

    Raises:
        RequestError: INVALID_ARGUMENT naming ``field``, there are more than ``most``.
    """
    if len(items) > most:
        raise invalid(field, f"has more than {most} members")
    return items


def stop_token_ids(request: GenerationRequest, limits: RequestLimits) -> tuple[int, ...]:
    """The ids that end a request: the checkpoint's, unless they are to be ignored, and the request's own."""
    eos = () if request.stop.ignore_eos else limits.eos_token_ids
    return tuple(dict.fromkeys((*eos, *request.stop.stop_token_ids)))


def _in_vocabulary(token_ids: Iterable[int], limits: RequestLimits) -> bool:
    bound = limits.vocab_size or 1 << 31
    return all(0 <= token_id < bound for token_id in token_ids)


def _something_is_left(request: GenerationRequest, limits: RequestLimits, excluded: Sequence[int]) -> bool:
    allowed = request.sampling.allowed_token_ids
    if allowed:
        return not set(allowed) <= set(excluded)
    return not limits.vocab_size or len(set(excluded)) < limits.vocab_size
