"""Files of JSON objects, one to a line."""

import json
from typing import Any

from baton.errors import InvalidRequestError


def numbered_lines(content: bytes) -> list[tuple[int, bytes]]:
    """The lines that are not blank, with their numbers, which count from 1."""
    lines = enumerate(content.split(b"\n"), start=1)
    return [(number, line.removesuffix(b"\r")) for number, line in lines if line.strip()]


def json_object(line: bytes) -> dict[str, Any]:
    """The object that is written there.

    Raises:
        InvalidRequestError: it is not a JSON object.
    """
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
