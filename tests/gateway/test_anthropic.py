"""Anthropic's HTTP API, through the real gateway and with the real client."""

from tests.foreign import ForeignScript

from .conftest import Gateway

MESSAGES = [{"role": "user", "content": "Write a function."}]


def test_messages(gateway: Gateway, anthropic: ForeignScript) -> None:
    asked = {"model": gateway.model, "messages": MESSAGES, "max_tokens": 20, "extra_body": {"temperature": 0}}
    whole = anthropic.call("message", **asked)
    (block,) = whole["content"]
    assert block["type"] == "text" and block["text"]
    assert whole["stop_reason"] == "max_tokens"
    assert whole["usage"]["output_tokens"] == 20
    pieces, final = anthropic.call("message_stream", **asked)
    assert len(pieces) > 1
    assert "".join(pieces) == final["content"][0]["text"] == block["text"]
    assert final["stop_reason"] == "max_tokens"


def test_stop_sequences(gateway: Gateway, anthropic: ForeignScript) -> None:
    asked = {"model": gateway.model, "messages": MESSAGES, "max_tokens": 20, "extra_body": {"temperature": 0}}
    text = anthropic.call("message", **asked)["content"][0]["text"]
    stop = text[8:12]
    answer = anthropic.call("message", **asked, stop_sequences=[stop])
    assert answer["stop_reason"] == "stop_sequence"
    assert answer["stop_sequence"] == stop
    assert answer["content"][0]["text"] == text[: text.index(stop)]
