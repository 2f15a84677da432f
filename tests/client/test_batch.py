"""Batches against a scripted server: bounded, complete, and cancelled when they are interrupted."""

import gc
import signal
import threading

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from google.rpc.error_details_pb2 import RetryInfo

from baton import Client, Completion, InvalidRequestError, RequestCancelledError, SamplingParams
from baton.batch import BatchRequest, Outcome, run_batch
from baton.options import GenerateOptions
from baton_protos import generation_pb2 as pb
from tests.client.fake_server import SILENCE, Answer, FakeServer, failure

CANCEL_SECONDS = 5.0
SOON = RetryInfo(retry_delay=Duration(nanos=100_000_000))


def echo(request: pb.GenerateRequest) -> Answer:
    """Answers with the prompt in capitals; refuses ``bad``, is silent on ``silent``."""
    if request.text == "bad":
        return failure(grpc.StatusCode.INVALID_ARGUMENT, "text: is bad")
    if request.text == "silent":
        return SILENCE
    sample = pb.Sample(text=request.text.upper(), token_ids=[7], finish_reason=pb.FINISH_REASON_LENGTH)
    return pb.GenerateResponse(samples=[sample], usage=pb.Usage(completion_tokens=1))


def run(client: Client, *prompts: str | list[int], in_flight: int = 4) -> list[Outcome]:
    outcomes: dict[int, Outcome] = {}
    requests = [BatchRequest(prompt, {}) for prompt in prompts]
    run_batch(client, requests, in_flight=in_flight, on_outcome=outcomes.__setitem__)
    return [outcomes[index] for index in range(len(prompts))]


def text(outcome: Outcome) -> str:
    assert isinstance(outcome, Completion)
    return outcome.text


@pytest.fixture(autouse=True)
def echoing(server: FakeServer) -> None:
    server.answer = echo


def test_every_request_has_its_outcome(server: FakeServer, client: Client) -> None:
    prompts = [f"p{index}" for index in range(50)]
    assert [text(outcome) for outcome in run(client, *prompts)] == [prompt.upper() for prompt in prompts]
    assert 1 < server.most_running <= 4


def test_nothing_to_do(client: Client) -> None:
    assert run(client) == []


def test_failures_do_not_stop_the_others(client: Client) -> None:
    good, bad, worse, also_good = run(client, "a", "bad", [-1], "b")
    assert [text(good), text(also_good)] == ["A", "B"]
    assert isinstance(bad, InvalidRequestError) and bad.message == "text: is bad"
    assert isinstance(worse, InvalidRequestError) and worse.field == "token_ids"


def test_what_a_full_queue_refuses_is_sent_again(server: FakeServer, client: Client) -> None:
    refusals = iter(range(5))

    def full_at_first(request: pb.GenerateRequest) -> Answer:
        if next(refusals, None) is not None:
            return failure(grpc.StatusCode.RESOURCE_EXHAUSTED, "full", SOON)
        return echo(request)

    server.answer = full_at_first
    assert [text(outcome) for outcome in run(client, "a", "b", "c")] == ["A", "B", "C"]
    assert len(server.requests) == 8


def test_ctrl_c_cancels_what_runs(server: FakeServer, client: Client) -> None:
    threading.Timer(0.5, signal.raise_signal, [signal.SIGINT]).start()
    with pytest.raises(KeyboardInterrupt):
        run(client, "silent", "a")
    assert server.cancelled.wait(CANCEL_SECONDS)


def test_an_error_of_the_listener_cancels_what_runs(server: FakeServer, client: Client) -> None:
    def refuse(_index: int, _outcome: Outcome) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run_batch(client, [BatchRequest("silent", {}), BatchRequest("a", {})], in_flight=2, on_outcome=refuse)
    assert server.cancelled.wait(CANCEL_SECONDS)


def test_submit(server: FakeServer, client: Client) -> None:
    done = threading.Event()
    pending = client.submit("a", seed=3)
    pending.when_done(done.set)
    assert pending.result().text == "A"
    assert done.wait(1)
    assert server.requests[0].sampling.seed == 3


def test_a_submitted_request_can_be_cancelled(server: FakeServer, client: Client) -> None:
    pending = client.submit("silent")
    threading.Timer(0.3, pending.cancel).start()
    with pytest.raises(RequestCancelledError):
        pending.result()
    assert server.cancelled.wait(CANCEL_SECONDS)


def test_a_submitted_request_that_is_dropped_is_cancelled(server: FakeServer, client: Client) -> None:
    pending = client.submit("silent")
    while not server.requests:
        threading.Event().wait(0.05)
    del pending
    gc.collect()
    assert server.cancelled.wait(CANCEL_SECONDS)


def test_sampling_params_are_the_keywords_of_the_client(server: FakeServer, client: Client) -> None:
    assert set(SamplingParams().options()) < set(GenerateOptions.__annotations__)
    params = SamplingParams(temperature=0.0, top_k=3, max_tokens=9, stop_token_ids=[4], ignore_eos=True, stop="end")
    client.submit("a", **params.options()).result()
    client.submit("a", temperature=0.0, top_k=3, max_tokens=9, stop_token_ids=[4], ignore_eos=True, stop="end").result()
    client.submit("a", **SamplingParams().options()).result()
    with_params, with_keywords, with_nothing = server.requests
    assert with_params == with_keywords
    assert with_nothing == pb.GenerateRequest(text="a")
