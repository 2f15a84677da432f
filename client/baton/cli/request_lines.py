"""The requests of a batch as lines of text: plain prompts, or JSON objects."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from baton.batch import BatchRequest
from baton.errors import InvalidRequestError
from baton.json_lines import json_object, numbered_lines
from baton.options import GenerateOptions
from baton.values import ChatMessage, Prompt

_PROMPTS: Mapping[str, type] = {"prompt": str, "token_ids": list, "messages": list}
_INTEGER, _NUMBER, _FLAG, _TEXT, _IDS = (int,), (int, float), (bool,), (str,), (list,)
_OPTIONS: Mapping[str, tuple[type, ...]] = {
    **dict.fromkeys(("max_tokens", "min_tokens", "top_k", "seed", "n"), _INTEGER),
    **dict.fromkeys(("logprobs", "prompt_logprobs", "priority"), _INTEGER),
    **dict.fromkeys(("temperature", "top_p", "min_p", "repetition_penalty"), _NUMBER),
    **dict.fromkeys(("frequency_penalty", "presence_penalty"), _NUMBER),
    **dict.fromkeys(("deadline", "queue_timeout", "resume_window"), _NUMBER),
    **dict.fromkeys(("ignore_eos", "include_stop", "processed_logprobs", "timings", "json_object"), _FLAG),
    **dict.fromkeys(("text", "skip_special_tokens"), _FLAG),
    **dict.fromkeys(("request_id", "model", "tenant", "cache_salt", "regex", "grammar"), _TEXT),
    **dict.fromkeys(("stop_token_ids", "allowed_token_ids", "banned_token_ids"), _IDS),
    "logit_bias": (dict,),
    **dict.fromkeys(("stop", "choice"), (list, str)),
    "json_schema": (str, dict),
}
_FIELDS = ("id", *_PROMPTS, *_OPTIONS)
_WORDS = {
    str: "text",
    list: "a list",
    dict: "an object",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
}


@dataclass(frozen=True, slots=True)
class RequestLine:
    """One line.

    Attributes:
        number: counts the lines of the file from 1.
        id: what its result is called: the line's ``id``, any JSON value, or else its number.
        text: the line itself.
        request: what to run, or what is wrong with the line.
    """

    number: int
    id: object
    text: str
    request: BatchRequest | InvalidRequestError


def json_lines(content: bytes, defaults: GenerateOptions) -> list[RequestLine]:
    """Reads JSON objects, one to a line; ``defaults`` are the options of those that do not say. Skips blank lines."""
    return [_json_line(number, line, defaults) for number, line in numbered_lines(content)]


def prompt_lines(content: bytes, options: GenerateOptions, *, chat: bool) -> list[RequestLine]:
    """Takes every line as a prompt or, for ``chat``, as a user's message. Skips blank lines."""
    return [_prompt_line(number, line, options, chat) for number, line in numbered_lines(content)]


def _prompt_line(number: int, line: bytes, options: GenerateOptions, chat: bool) -> RequestLine:
    try:
        text = line.decode()
    except UnicodeDecodeError as error:
        return RequestLine(number, number, _readable(line), InvalidRequestError(f"not UTF-8: {error.reason}"))
    return RequestLine(number, number, text, BatchRequest([ChatMessage("user", text)] if chat else text, options))


def _json_line(number: int, line: bytes, defaults: GenerateOptions) -> RequestLine:
    name: object = number
    try:
        values = json_object(line)
        name = values.get("id", number)
        options = cast(GenerateOptions, {**defaults, **_options(values)})
        return RequestLine(number, name, _readable(line), BatchRequest(_prompt(values), options))
    except InvalidRequestError as error:
        return RequestLine(number, name, _readable(line), error)


def _readable(line: bytes) -> str:
    return line.decode(errors="replace")


def _prompt(values: Mapping[str, Any]) -> Prompt:
    given = [name for name in _PROMPTS if name in values]
    if len(given) != 1:
        raise InvalidRequestError(f"needs exactly one of {', '.join(_PROMPTS)}")
    (name,) = given
    _check(name, values[name], (_PROMPTS[name],))
    if name == "token_ids":
        _check_ids(name, values[name])
    elif name == "messages" and not (values[name] and all(isinstance(turn, dict) for turn in values[name])):
        raise InvalidRequestError("messages: must be objects with role and content", field=name)
    return cast(Prompt, values[name])


def _options(values: Mapping[str, Any]) -> dict[str, Any]:
    """The options that are set; null is as good as nothing."""
    for name in values:
        if name not in _FIELDS:
            raise InvalidRequestError(f"{name}: no such field; there are {', '.join(_FIELDS)}", field=name)
    options = {name: values[name] for name in _OPTIONS if values.get(name) is not None}
    for name, value in options.items():
        _check(name, value, _OPTIONS[name])
        if _OPTIONS[name] is _IDS:
            _check_ids(name, value)
    if "logit_bias" in options:
        options["logit_bias"] = _biases(options["logit_bias"])
    return options


def _biases(values: Mapping[str, object]) -> dict[int, object]:
    """JSON's keys are texts."""
    try:
        return {int(token_id): bias for token_id, bias in values.items()}
    except ValueError:
        raise InvalidRequestError("logit_bias: names must be token ids", field="logit_bias") from None


def _check(name: str, value: object, kinds: Sequence[type]) -> None:
    if type(value) not in kinds:  # not isinstance: true is no number
        raise InvalidRequestError(f"{name}: must be {_WORDS[kinds[-1]]}", field=name)


def _check_ids(name: str, ids: Sequence[object]) -> None:
    if not all(type(one) is int for one in ids):
        raise InvalidRequestError(f"{name}: must be a list of whole numbers", field=name)
