"""What a request asks for, by the names of vLLM's sampling parameters, which Triton's clients use."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from scheduler_service.api.errors import invalid
from scheduler_service.api.request import (
    GenerationRequest,
    OutputOptions,
    Prompt,
    Sampling,
    StopConditions,
    StructuredKind,
    StructuredOutput,
)

# What JSON can say, and tensors: numbers may be texts, and one element alone may stand for a list.
Value = Any

_MAX_JSON_CHARS = 256 * 1024


@dataclass(frozen=True, slots=True)
class _Option:
    """``path`` is where the value goes in a request; ``read`` gets the value and the path."""

    path: str
    read: Callable[[Value, str], object]


def read_options(options: Mapping[str, Value], prompt: Prompt | None, model: str) -> GenerationRequest:
    """A request with these options; what is not among them has its default.

    Raises:
        RequestError: INVALID_ARGUMENT, an option is unknown, given twice under two names, or not of its type.
    """
    parts: dict[str, dict[str, Any]] = {"": {}, "sampling": {}, "stop": {}, "output": {"text": True}}
    for name, value in options.items():
        option = _OPTIONS.get(name)
        if option is None:
            raise invalid("parameters", f"there is no option {name[:64]!r}")
        part, _, field = option.path.rpartition(".")
        if field in parts[part]:
            raise invalid(option.path, "is given twice")
        parts[part][field] = option.read(value, option.path)
    return GenerationRequest(
        prompt=prompt,
        model=model,
        sampling=Sampling(**parts["sampling"]),
        stop=StopConditions(**parts["stop"]),
        output=OutputOptions(**parts["output"]),
        **parts[""],
    )


def read_json_object(text: Value, field: str) -> dict[str, Value]:
    """The members of a JSON object; those that are null are left out.

    Raises:
        RequestError: INVALID_ARGUMENT naming ``field``: it is none, or too large.
    """
    if not isinstance(text, str):
        raise invalid(field, "must be text")
    if len(text) > _MAX_JSON_CHARS:
        raise invalid(field, f"has more than {_MAX_JSON_CHARS} characters")
    try:
        content = json.loads(text)
        json.dumps(content, ensure_ascii=False).encode()  # JSON can spell halves of characters, which are no text
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        raise invalid(field, "must be a JSON object")
    return {name: value for name, value in content.items() if value is not None}


def read_flag(value: Value, field: str) -> bool:
    """A truth value, or a text that says it.

    Raises:
        RequestError: INVALID_ARGUMENT naming ``field``.
    """
    value = _single(value)
    if isinstance(value, str) and value.lower() in ("true", "false"):
        return value.lower() == "true"
    if not isinstance(value, bool):
        raise invalid(field, "must be true or false")
    return value


def read_text(value: Value, field: str) -> str:
    """A text.

    Raises:
        RequestError: INVALID_ARGUMENT naming ``field``.
    """
    value = _single(value)
    if not isinstance(value, str):
        raise invalid(field, "must be one text")
    return value


def _number(value: Value, field: str) -> float:
    value = _single(value)
    try:
        if isinstance(value, bool) or not isinstance(value, int | float | str):
            raise ValueError
        return float(value)
    except (ValueError, OverflowError):
        raise invalid(field, "must be a number") from None


def _integer(value: Value, field: str) -> int:
    value = _single(value)
    try:
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int | str):
            raise ValueError
        return int(value)
    except ValueError:
        raise invalid(field, "must be an integer") from None


def _integers(value: Value, field: str) -> tuple[int, ...]:
    return tuple(_integer(one, field) for one in _many(value))


def _texts(value: Value, field: str) -> tuple[str, ...]:
    return tuple(read_text(one, field) for one in _many(value))


def _biases(value: Value, field: str) -> dict[int, float]:
    content = value if isinstance(value, dict) else read_json_object(_single(value), field)
    return {_integer(token_id, field): _number(bias, field) for token_id, bias in content.items()}


def _milliseconds(value: Value, field: str) -> int:
    return -(-_integer(value, field) // 1000)  # of microseconds


def _structured(value: Value, field: str) -> StructuredOutput | None:
    content = value if isinstance(value, dict) else read_json_object(_single(value), field)
    if len(content) != 1:
        raise invalid(field, "must have one format")
    ((name, wanted),) = content.items()
    match name:
        case "json":
            schema = wanted if isinstance(wanted, str) else json.dumps(wanted)
            return StructuredOutput(StructuredKind.JSON_SCHEMA, (schema,))
        case "json_object":
            return StructuredOutput(StructuredKind.JSON_OBJECT) if read_flag(wanted, field) else None
        case "choice":
            return StructuredOutput(StructuredKind.CHOICE, _texts(wanted, field))
        case "regex" | "grammar":
            return StructuredOutput(StructuredKind(name), (read_text(wanted, field),))
        case _:
            raise invalid(field, f"there is no format {name[:64]!r}")


def _single(value: Value) -> Value:
    return value[0] if isinstance(value, list) and len(value) == 1 else value


def _many(value: Value) -> Sequence[Value]:
    return value if isinstance(value, list) else [value]


_OPTIONS = {
    "temperature": _Option("sampling.temperature", _number),
    "top_k": _Option("sampling.top_k", _integer),
    "top_p": _Option("sampling.top_p", _number),
    "min_p": _Option("sampling.min_p", _number),
    "repetition_penalty": _Option("sampling.repetition_penalty", _number),
    "frequency_penalty": _Option("sampling.frequency_penalty", _number),
    "presence_penalty": _Option("sampling.presence_penalty", _number),
    "seed": _Option("sampling.seed", _integer),
    "random_seed": _Option("sampling.seed", _integer),
    "logit_bias": _Option("sampling.logit_bias", _biases),
    "allowed_token_ids": _Option("sampling.allowed_token_ids", _integers),
    "banned_token_ids": _Option("sampling.banned_token_ids", _integers),
    "structured_outputs": _Option("sampling.structured", _structured),
    "guided_decoding": _Option("sampling.structured", _structured),
    "max_tokens": _Option("stop.max_tokens", _integer),
    "min_tokens": _Option("stop.min_tokens", _integer),
    "stop": _Option("stop.stop_strings", _texts),
    "stop_words": _Option("stop.stop_strings", _texts),
    "stop_token_ids": _Option("stop.stop_token_ids", _integers),
    "ignore_eos": _Option("stop.ignore_eos", read_flag),
    "include_stop_str_in_output": _Option("stop.include_stop", read_flag),
    "skip_special_tokens": _Option("output.skip_special_tokens", read_flag),
    "logprobs": _Option("output.logprobs", _integer),
    "n": _Option("n", _integer),
    "priority": _Option("priority", _integer),
    "timeout": _Option("queue_timeout_ms", _milliseconds),
    "tenant": _Option("tenant", read_text),
    "cache_salt": _Option("cache_salt", read_text),
}
