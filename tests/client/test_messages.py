"""Requests as they are built and answers as they are read, whatever client it is."""

from dataclasses import fields
from typing import Any

import pytest

from baton import ChatMessage, GenerateOptions, InvalidRequestError
from baton.messages import cluster_status, generate_request, tokenize_request
from baton.values import ClusterStatus, ExecutorStatus
from baton_protos import generation_pb2 as pb

EVERYTHING: GenerateOptions = {
    "max_tokens": 9,
    "min_tokens": 3,
    "temperature": 0.5,
    "top_k": 3,
    "top_p": 0.25,
    "min_p": 0.125,
    "repetition_penalty": 1.5,
    "frequency_penalty": -0.5,
    "presence_penalty": 2.0,
    "logit_bias": {7: -100.0, 8: 1.5},
    "allowed_token_ids": [7, 8, 9],
    "banned_token_ids": (9,),
    "seed": 2**64 - 1,
    "n": 4,
    "stop": ["end", "fin"],
    "include_stop": True,
    "stop_token_ids": (1, 2),
    "ignore_eos": True,
    "deadline": 1_800_000_000.25,
    "logprobs": 0,
    "prompt_logprobs": 20,
    "processed_logprobs": True,
    "text": False,
    "skip_special_tokens": False,
    "timings": True,
    "request_id": "mine",
    "model": "m",
    "priority": -5,
    "tenant": "us",
    "cache_salt": "salt",
    "queue_timeout": 1.5,
    "resume_window": 30,
}


def test_nothing_is_set_that_the_caller_left_open() -> None:
    assert generate_request("hi") == pb.GenerateRequest(text="hi")
    nothing: Any = dict.fromkeys(GenerateOptions.__annotations__)
    assert generate_request("hi", **nothing) == pb.GenerateRequest(text="hi")


def test_zero_is_a_value_of_its_own() -> None:
    request = generate_request("hi", temperature=0.0, top_k=0, seed=0, logprobs=0)
    assert [request.sampling.HasField(name) for name in ("temperature", "top_k", "seed")] == [True] * 3
    assert request.output.HasField("logprobs")
    assert not request.sampling.HasField("top_p")


def test_everything_reaches_its_field() -> None:
    structured = {"json_schema", "json_object", "regex", "choice", "grammar"}  # at most one, and see their own tests
    assert EVERYTHING.keys() == set(GenerateOptions.__annotations__) - structured
    assert generate_request([5, 6], **EVERYTHING) == pb.GenerateRequest(
        request_id="mine",
        model="m",
        token_ids=pb.TokenIds(ids=[5, 6]),
        sampling=pb.SamplingParams(
            temperature=0.5,
            top_k=3,
            top_p=0.25,
            min_p=0.125,
            repetition_penalty=1.5,
            frequency_penalty=-0.5,
            presence_penalty=2.0,
            seed=2**64 - 1,
            logit_bias={7: -100.0, 8: 1.5},
            allowed_token_ids=[7, 8, 9],
            banned_token_ids=[9],
        ),
        stop=pb.StopConditions(
            max_tokens=9,
            min_tokens=3,
            stop_token_ids=[1, 2],
            ignore_eos=True,
            stop_strings=["end", "fin"],
            include_stop=True,
            deadline_unix_ms=1_800_000_000_250,
        ),
        output=pb.OutputOptions(
            text=False,
            skip_special_tokens=False,
            logprobs=0,
            prompt_logprobs=20,
            logprob_kind=pb.LOGPROB_KIND_PROCESSED,
            timings=True,
        ),
        n=4,
        priority=-5,
        tenant="us",
        cache_salt="salt",
        queue_timeout_ms=1500,
        resume_window_ms=30_000,
    )


def test_one_stop_string_needs_no_list() -> None:
    assert generate_request("x", stop="end").stop.stop_strings == ["end"]


def test_a_time_above_zero_is_never_rounded_to_no_limit() -> None:
    assert generate_request("x", queue_timeout=1e-9).queue_timeout_ms == 1


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
        ("stop.stop_strings", "x", {"stop": [3]}),
        ("stop.stop_strings", "x", {"stop": 3}),
        ("stop.deadline_unix_ms", "x", {"deadline": -1.5}),
        ("sampling.logit_bias", "x", {"logit_bias": {-1: 1.0}}),
        ("sampling.logit_bias", "x", {"logit_bias": {1: "much"}}),
        ("sampling.logit_bias", "x", {"logit_bias": 3}),
        ("sampling.temperature", "x", {"temperature": {1: 2}}),
        ("output.logprobs", "x", {"logprobs": -1}),
        ("n", "x", {"n": 1.5}),
        ("priority", "x", {"priority": 2**31}),
        ("queue_timeout_ms", "x", {"queue_timeout": "soon"}),
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


def test_a_status_tells_all_that_the_cluster_says() -> None:
    for value, message in (
        (ExecutorStatus, pb.ExecutorStatus.DESCRIPTOR),
        (ClusterStatus, pb.GetClusterStatusResponse.DESCRIPTOR),
    ):
        assert {field.name for field in fields(value)} == set(message.fields_by_name)
    sent = pb.ExecutorStatus(stale_tokens=1, audited_tokens=2, audit_mismatches=3, handovers=4)
    read = cluster_status(pb.GetClusterStatusResponse(oldest_queued_us=5, executors=[sent]))
    one = read.executors[0]
    found = (one.stale_tokens, one.audited_tokens, one.audit_mismatches, one.handovers, read.oldest_queued_us)
    assert found == (1, 2, 3, 4, 5)
