"""Calls with the `openai` package, for ForeignScript: its argument is the gateway's address."""

import sys
from typing import Any

import openai

client = openai.OpenAI(base_url=sys.argv[1], api_key="none", max_retries=0, timeout=60)


def models() -> Any:
    return [model.id for model in client.models.list().data]


def chat(**arguments: Any) -> Any:
    return client.chat.completions.create(**arguments).model_dump()


def chat_stream(**arguments: Any) -> Any:
    usage = {"include_usage": True}
    return [one.model_dump() for one in client.chat.completions.create(stream=True, stream_options=usage, **arguments)]


def completion(**arguments: Any) -> Any:
    return client.completions.create(**arguments).model_dump()


def completion_stream(**arguments: Any) -> Any:
    return [one.model_dump() for one in client.completions.create(stream=True, **arguments)]


def error(**arguments: Any) -> Any:
    """Status and message of a completion that is refused."""
    try:
        client.completions.create(**arguments)
    except openai.APIStatusError as refused:
        return refused.status_code, refused.message
    return 200, ""


def leave(after: int, **arguments: Any) -> Any:
    """Close a stream after so many events."""
    stream = client.completions.create(stream=True, **arguments)
    for count, _ in enumerate(stream, start=1):
        if count == after:
            break
    stream.close()
    return after
