"""The requests of a batch as lines of text: plain prompts, or JSON objects."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from baton.batch import BatchRequest
from baton.errors import InvalidRequestError
from baton.messages import GenerateOptions
from baton.values import ChatMessage, Prompt

_PROMPTS: Mapping[str, type] = {"prompt": str, "token_ids": list, "messages": list}
_SAMPLING: Mapping[str, tuple[type, ...]] = {
    "max_tokens": (int,),
    "temperature": (int, float),
    "top_k": (int,),
    "top_p": (int, float),
    "seed": (int,),
    "stop_token_ids": (list,),
    "ignore_eos": (bool,),
}
_FIELDS = ("id", *_PROMPTS, *_SAMPLING)
_WORDS = {str: "text", list: "a list", int: "a whole number", float: "a number", bool: "true or false"}


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
    return [_json_line(number, line, defaults) for number, line in _numbered(content)]


def prompt_lines(content: bytes, options: GenerateOptions, *, chat: bool) -> list[RequestLine]:
    """Takes every line as a prompt or, for ``chat``, as a user's message. Skips blank lines."""
    return [_prompt_line(number, line, options, chat) for number, line in _numbered(content)]


def _numbered(content: bytes) -> list[tuple[int, bytes]]:
    lines = enumerate(content.split(b"\n"), start=1)
    return [(number, line.removesuffix(b"\r")) for number, line in lines if line.strip()]


def _prompt_line(number: int, line: bytes, options: GenerateOptions, chat: bool) -> RequestLine:
    try:
        text = line.decode()
    except UnicodeDecodeError as error:
        return RequestLine(number, number, _readable(line), InvalidRequestError(f"not UTF-8: {error.reason}"))
    return RequestLine(number, number, text, BatchRequest([ChatMessage("user", text)] if chat else text, options))


def _json_line(number: int, line: bytes, defaults: GenerateOptions) -> RequestLine:
    name: object = number
    try:
        values = _object(line)
        name = values.get("id", number)
        options = cast(GenerateOptions, {**defaults, **_options(values)})
        return RequestLine(number, name, _readable(line), BatchRequest(_prompt(values), options))
    except InvalidRequestError as error:
        return RequestLine(number, name, _readable(line), error)


def _readable(line: bytes) -> str:
    return line.decode(errors="replace")


def _object(line: bytes) -> dict[str, Any]:
    try:
        value = json.loads(line.decode())
    except json.JSONDecodeError as error:
        raise InvalidRequestError(f"not JSON: {error.msg} at column {error.colno}") from error
    except UnicodeDecodeError as error:
        raise InvalidRequestError(f"not UTF-8: {error.reason}") from error
    except RecursionError as error:
        raise InvalidRequestError("not a request: nested too deeply") from error
    if not isinstance(value, dict):
        raise InvalidRequestError("not a JSON object")
    return value


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
    """The sampling fields that are set; null is as good as nothing."""
    for name in values:
        if name not in _FIELDS:
            raise InvalidRequestError(f"{name}: no such field; there are {', '.join(_FIELDS)}", field=name)
    options = {name: values[name] for name in _SAMPLING if values.get(name) is not None}
    for name, value in options.items():
        _check(name, value, _SAMPLING[name])
        if name == "stop_token_ids":
            _check_ids(name, value)
    return options


def _check(name: str, value: object, kinds: Sequence[type]) -> None:
    if type(value) not in kinds:  # not isinstance: true is no number
        raise InvalidRequestError(f"{name}: must be {_WORDS[kinds[-1]]}", field=name)


def _check_ids(name: str, ids: Sequence[object]) -> None:
    if not all(type(one) is int for one in ids):
        raise InvalidRequestError(f"{name}: must be a list of whole numbers", field=name)
