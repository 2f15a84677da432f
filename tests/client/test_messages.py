"""Requests as they are built, whatever client sends them."""

from typing import Any

import pytest

from baton import ChatMessage, InvalidRequestError
from baton.messages import generate_request, tokenize_request
from baton_protos import generation_pb2 as pb


def test_nothing_is_set_that_the_caller_left_open() -> None:
    assert generate_request("hi") == pb.GenerateRequest(text="hi", stop=pb.StopConditions(ignore_eos=False))


def test_zero_is_a_value_of_its_own() -> None:
    request = generate_request("hi", temperature=0.0, top_k=0, seed=0)
    assert [request.sampling.HasField(name) for name in ("temperature", "top_k", "seed")] == [True] * 3
    assert not request.sampling.HasField("top_p")


def test_everything_reaches_its_field() -> None:
    request = generate_request(
        [5, 6],
        max_tokens=9,
        temperature=0.5,
        top_k=3,
        top_p=0.25,
        seed=2**64 - 1,
        stop_token_ids=(1, 2),
        ignore_eos=True,
        request_id="mine",
        model="m",
    )
    assert request == pb.GenerateRequest(
        request_id="mine",
        model="m",
        token_ids=pb.TokenIds(ids=[5, 6]),
        sampling=pb.SamplingParams(temperature=0.5, top_k=3, top_p=0.25, seed=2**64 - 1),
        stop=pb.StopConditions(max_tokens=9, stop_token_ids=[1, 2], ignore_eos=True),
    )


@pytest.mark.parametrize(
    "prompt", [[ChatMessage("user", "hi")], [{"role": "user", "content": "hi"}], (ChatMessage("user", "hi"),)]
)
def test_conversations(prompt: Any) -> None:
    chat = pb.ChatMessages(messages=[pb.ChatMessage(role="user", content="hi")])
    assert generate_request(prompt).chat == chat
    assert tokenize_request(prompt).chat == chat


def test_an_empty_list_is_a_list_of_token_ids() -> None:
    assert generate_request([]).WhichOneof("prompt") == "token_ids"


@pytest.mark.parametrize(
    ("field", "prompt", "options"),
    [
        ("token_ids", [-1], {}),
        ("token_ids", [2**32], {}),
        ("token_ids", [0.5], {}),
        ("token_ids", ["a", "b"], {}),
        ("text", "\ud800", {}),
        ("chat", [{"role": "user"}], {}),
        ("chat", [{"role": "user", "content": 3}], {}),
        ("chat", [{"role": "user", "content": "x", "name": "y"}], {}),
        ("sampling.seed", "x", {"seed": -1}),
        ("sampling.seed", "x", {"seed": 2**64}),
        ("sampling.top_k", "x", {"top_k": -1}),
        ("sampling.top_k", "x", {"top_k": 1.5}),
        ("sampling.temperature", "x", {"temperature": "hot"}),
        ("stop.max_tokens", "x", {"max_tokens": -1}),
        ("stop.stop_token_ids", "x", {"stop_token_ids": [-1]}),
        ("request_id", "x", {"request_id": 3}),
    ],
)
def test_what_fits_no_field_names_the_field(field: str, prompt: Any, options: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        generate_request(prompt, **options)
    assert caught.value.field == field
    assert isinstance(caught.value, ValueError)


def test_an_unknown_option_is_a_type_error() -> None:
    with pytest.raises(TypeError, match="max_token"):
        generate_request("x", max_token=3)  # type: ignore[call-arg]
