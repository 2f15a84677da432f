"""Calls with the `anthropic` package, for ForeignScript: its argument is the gateway's address."""

import sys
from typing import Any

import anthropic

client = anthropic.Anthropic(base_url=sys.argv[1].removesuffix("/v1"), api_key="none", max_retries=0, timeout=60)


def message(**arguments: Any) -> Any:
    return client.messages.create(**arguments).model_dump()


def message_stream(**arguments: Any) -> Any:
    """Pieces of text, and the message that they make."""
    with client.messages.stream(**arguments) as stream:
        return list(stream.text_stream), stream.get_final_message().model_dump()
