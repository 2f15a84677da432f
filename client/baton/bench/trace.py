"""Recorded traffic: JSON lines that say when a request came and how long its prompt and its output were.

Also reads the Mooncake traces (Qin et al., 2024, github.com/kvcache-ai/Mooncake): ``timestamp`` in milliseconds,
``input_length``, ``output_length``, and ``hash_ids``, which name the 512-token blocks of the prompt: requests with a
common beginning of these share that much of their prompts.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from baton.bench.lengths import MAX_TOKENS
from baton.errors import InvalidRequestError
from baton.json_lines import json_object, numbered_lines

BLOCK_TOKENS = 512  # what an entry of hash_ids stands for


@dataclass(frozen=True, slots=True)
class TraceRequest:
    """One request of a trace.

    Attributes:
        offset: seconds after the start; None where the line does not say.
        prompt: its text; empty = made up from ``input_tokens``.
        input_tokens: length of a prompt to make up.
        output_tokens: how many to generate.
        block_ids: names of the prompt's blocks of ``BLOCK_TOKENS``; equal names, equal tokens.
    """

    offset: float | None
    prompt: str
    input_tokens: int
    output_tokens: int
    block_ids: tuple[int, ...] = ()


def parse_trace(content: bytes) -> list[TraceRequest]:
    """Reads a trace and sorts it by time.

    Raises:
        InvalidRequestError: a line is no request, or only some lines say when; the message has its number.
    """
    requests = []
    for number, line in numbered_lines(content):
        try:
            requests.append(_request(json_object(line)))
        except InvalidRequestError as error:
            raise InvalidRequestError(f"line {number} of the trace: {error.message}") from error
    if not requests:
        raise InvalidRequestError("the trace is empty")
    if len({request.offset is None for request in requests}) > 1:
        raise InvalidRequestError("only some lines of the trace say when their request came")
    return sorted(requests, key=lambda request: request.offset or 0.0)


def _request(values: Mapping[str, Any]) -> TraceRequest:
    prompt = values.get("prompt", "")
    if not isinstance(prompt, str):
        raise InvalidRequestError("prompt: must be text")
    offset = _seconds(values, "offset", 1.0)
    return TraceRequest(
        offset=_seconds(values, "timestamp", 1e-3) if offset is None else offset,
        prompt=prompt,
        input_tokens=0 if prompt else _count(values, "input_tokens", "input_length"),
        output_tokens=_count(values, "output_tokens", "output_length"),
        block_ids=_block_ids(values.get("hash_ids", [])),
    )


def _seconds(values: Mapping[str, Any], name: str, unit: float) -> float | None:
    value = values.get(name)
    if value is None:
        return None
    if type(value) not in (int, float) or not 0 <= value < math.inf:
        raise InvalidRequestError(f"{name}: must be a number, 0 or greater")
    return float(value * unit)


def _count(values: Mapping[str, Any], *names: str) -> int:
    for name in names:
        if name in values:
            value = values[name]
            if type(value) is not int or not 1 <= value <= MAX_TOKENS:
                raise InvalidRequestError(f"{name}: must be a whole number, 1 to {MAX_TOKENS}")
            return value
    raise InvalidRequestError(f"needs {' or '.join(names)}")


def _block_ids(value: object) -> tuple[int, ...]:
    if not isinstance(value, list) or not all(type(one) is int and one >= 0 for one in value):
        raise InvalidRequestError("hash_ids: must be a list of whole numbers, 0 or greater")
    return tuple(value)
