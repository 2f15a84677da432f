"""What cannot be served is refused with a typed error that names the field; the cluster goes on."""

import math
from typing import Any

import pytest

from baton import BatonError, Client, InvalidRequestError, ModelNotFoundError

VOCABULARY = 4160  # of the random checkpoint
BAD_REQUESTS: list[tuple[str, Any, dict[str, Any]]] = [
    ("text", "", {}),
    ("token_ids", [], {}),
    ("token_ids", [VOCABULARY], {}),
    ("token_ids", [2**32 - 1], {}),
    ("token_ids", [1] * 2048, {}),
    ("token_ids", [1] * 100_000, {}),
    ("text", "word " * 100_000, {}),
    ("text", "x" * 5_000_000, {}),
    ("chat", [{"role": "", "content": "hi"}], {}),
    ("chat", [{"role": "user", "content": "hi"}] * 5000, {}),
    ("stop.max_tokens", "x", {"max_tokens": 0}),
    ("stop.max_tokens", "x", {"max_tokens": 2048}),
    ("stop.max_tokens", "x", {"max_tokens": 2**32 - 1}),
    ("stop.stop_token_ids", "x", {"stop_token_ids": [VOCABULARY]}),
    ("stop.stop_token_ids", "x", {"stop_token_ids": list(range(17))}),
    ("sampling.temperature", "x", {"temperature": -0.1}),
    ("sampling.temperature", "x", {"temperature": math.nan}),
    ("sampling.temperature", "x", {"temperature": math.inf}),
    ("sampling.top_p", "x", {"top_p": 0.0}),
    ("sampling.top_p", "x", {"top_p": 1.5}),
    ("sampling.top_p", "x", {"top_p": math.nan}),
    ("sampling.top_k", "x", {"top_k": 2**32 - 1}),
    ("request_id", "x", {"request_id": "r" * 129}),
    ("request_id", "x", {"request_id": "new\nline"}),
]


@pytest.fixture(autouse=True)
def the_cluster_goes_on(client: Client) -> Any:
    yield
    assert len(client.generate("def f", max_tokens=2, ignore_eos=True).token_ids) == 2


@pytest.mark.parametrize(("field", "prompt", "changes"), BAD_REQUESTS)
def test_refused_with_the_field(client: Client, field: str, prompt: Any, changes: dict[str, Any]) -> None:
    for call in (
        lambda: client.generate(prompt, timeout=20, **{"max_tokens": 4, **changes}),
        lambda: client.stream(prompt, timeout=20, **{"max_tokens": 4, **changes}).result(),
    ):
        with pytest.raises(InvalidRequestError) as caught:
            call()
        assert caught.value.field == field
        assert len(caught.value.message) < 500


def test_another_model_is_not_found(client: Client) -> None:
    with pytest.raises(ModelNotFoundError):
        client.generate("x", model="gpt-7")
    served = client.model_info().model
    assert client.generate("x", model=served, max_tokens=1).usage.completion_tokens == 1


def test_a_request_that_fills_the_context_exactly_is_served(client: Client) -> None:
    limit = client.model_info().max_total_tokens
    completion = client.generate([1] * (limit - 3), max_tokens=3, ignore_eos=True)
    assert len(completion.token_ids) == 3
    with pytest.raises(BatonError):
        client.generate([1] * (limit - 3), max_tokens=4)


def test_two_requests_of_one_name(client: Client) -> None:
    with client.stream("x", max_tokens=1000, ignore_eos=True, request_id="twin") as first:
        next(first)
        with pytest.raises(BatonError) as caught:
            client.generate("x", max_tokens=1, request_id="twin")
        assert caught.value.code == "ALREADY_EXISTS"
