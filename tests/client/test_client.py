"""The synchronous client against a scripted server."""

import gc
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.rpc.error_details_pb2 import BadRequest, RetryInfo
from grpc_health.v1 import health_pb2

from baton import (
    BatonError,
    Client,
    ConnectFailedError,
    DeadlineExceededError,
    ExecutorNotFoundError,
    FinishReason,
    InvalidRequestError,
    ModelNotFoundError,
    OverloadedError,
    ProtocolError,
    RequestCancelledError,
    RequestExistsError,
    RequestFailedError,
    UnavailableError,
    Usage,
)
from baton_protos import generation_pb2 as pb
from tests.client.fake_server import SILENCE, FakeServer, chunk, end, failure, start

CANCEL_SECONDS = 5.0
BAD_TOP_P = BadRequest(field_violations=[BadRequest.FieldViolation(field="sampling.top_p", description="no")])
FORGETFUL = """
import atexit, sys
def ask():  # after everybody else has cleaned up
    try:
        next(stream)
    except Exception as error:
        print(error)
atexit.register(ask)
from baton import Client
client = Client(sys.argv[1])
stream = client.stream("hi")
next(stream)
"""
RETRY_SOON = RetryInfo(retry_delay=Duration(seconds=1, nanos=500_000_000))


def test_generate(server: FakeServer, client: Client) -> None:
    server.stream = [start(request_id="r", seed=3, prompt_token_ids=[1]), chunk(0, [4, 5], "hello", 0)]
    server.stream.append(end(2, pb.FINISH_REASON_STOP))
    completion = client.generate("hi", max_tokens=2, temperature=0.0)
    assert (completion.text, completion.token_ids) == ("hello", (4, 5))
    assert completion.finish_reason is FinishReason.STOP and completion.finish_reason == "stop"
    assert completion.usage == Usage(2, 1, 2)
    assert (completion.prompt_token_ids, completion.seed, completion.request_id) == ((1,), 3, "r")
    assert server.requests[0].stop.max_tokens == 2


def test_stream(server: FakeServer, client: Client) -> None:
    server.stream = [start(), chunk(0, [4], "he", 0), chunk(1, [5], "llo", 2), end(2)]
    with client.stream("hi") as stream:
        assert [delta.text for delta in stream] == ["he", "llo"]
        assert stream.completion.text == "hello"
        assert stream.request_id == "r1"
    assert list(stream) == [] and stream.result() == stream.completion


def test_result_reads_the_rest(server: FakeServer, client: Client) -> None:
    server.stream = [start(), chunk(0, [4], "he", 0), chunk(1, [5], "llo", 2), end(2)]
    stream = client.stream("hi")
    next(stream)
    with pytest.raises(RuntimeError, match="result"):
        _ = stream.completion
    assert stream.result().token_ids == (4, 5)


def test_close_cancels_and_later_reads_say_so(server: FakeServer, client: Client) -> None:
    server.stream = [start(), chunk(0, [4], "he", 0), SILENCE]
    stream = client.stream("hi")
    next(stream)
    stream.close()
    assert server.cancelled.wait(CANCEL_SECONDS)
    with pytest.raises(RequestCancelledError):
        next(stream)


def test_break_cancels(server: FakeServer, client: Client) -> None:
    server.stream = [start(), chunk(0, [4], "he", 0), SILENCE]
    for _ in client.stream("hi"):
        break
    gc.collect()
    assert server.cancelled.wait(CANCEL_SECONDS)


def test_ctrl_c_cancels(server: FakeServer, client: Client) -> None:
    server.stream = [start(), chunk(0, [4], "he", 0), SILENCE]
    threading.Timer(0.5, signal.raise_signal, [signal.SIGINT]).start()
    stream = client.stream("hi")
    with pytest.raises(KeyboardInterrupt):
        list(stream)
    assert server.cancelled.wait(CANCEL_SECONDS)


def test_a_hole_cancels(server: FakeServer, client: Client) -> None:
    server.stream = [start(), chunk(1, [4], "he", 0), SILENCE]
    stream = client.stream("hi")
    with pytest.raises(ProtocolError):
        next(stream)
    assert server.cancelled.wait(CANCEL_SECONDS)


def test_timeout(server: FakeServer, client: Client) -> None:
    server.stream = [start(), SILENCE]
    with pytest.raises(DeadlineExceededError):
        client.stream("hi", timeout=0.3).result()
    assert server.cancelled.wait(CANCEL_SECONDS)


@pytest.mark.parametrize(
    ("code", "details", "expected"),
    [
        (grpc.StatusCode.INVALID_ARGUMENT, [BAD_TOP_P], InvalidRequestError),
        (grpc.StatusCode.OUT_OF_RANGE, [], InvalidRequestError),
        (grpc.StatusCode.NOT_FOUND, [], ModelNotFoundError),
        (grpc.StatusCode.ALREADY_EXISTS, [], RequestExistsError),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, [RETRY_SOON], OverloadedError),
        (grpc.StatusCode.UNAVAILABLE, [RETRY_SOON], UnavailableError),
        (grpc.StatusCode.INTERNAL, [], RequestFailedError),
        (grpc.StatusCode.FAILED_PRECONDITION, [], RequestFailedError),
    ],
)
def test_statuses_become_typed_errors(
    server: FakeServer,
    client: Client,
    code: grpc.StatusCode,
    details: Iterable[Message],
    expected: type[BatonError],
) -> None:
    server.answer = failure(code, "because", *details)
    server.stream = [failure(code, "because", *details)]
    for call in (lambda: client.generate("x"), lambda: client.stream("x").result()):
        with pytest.raises(BatonError, match="because") as caught:
            call()
        assert type(caught.value) is expected
        assert caught.value.code == code.name
        if isinstance(caught.value, InvalidRequestError):
            assert caught.value.field == ("sampling.top_p" if details else "")
        if isinstance(caught.value, OverloadedError | UnavailableError):
            assert caught.value.retry_after == 1.5


def test_a_message_above_the_limit_is_an_invalid_request(server: FakeServer, client: Client) -> None:
    with pytest.raises(InvalidRequestError, match="too large"):
        client.generate("x" * 5_000_000)  # above the fake server's limit
    with pytest.raises(InvalidRequestError, match="too large"):
        client.generate("x" * 70_000_000)  # above the client's own


def test_unavailable_is_retried_before_the_first_message(server: FakeServer, client: Client) -> None:
    server.refusals = 2
    server.stream = [start(), chunk(0, [4], "he", 0), end(1)]
    assert client.stream("hi").result().token_ids == (4,)
    assert len(server.requests) == 3


def test_small_calls(server: FakeServer, client: Client) -> None:
    assert client.tokenize("ab") == (97, 98)
    assert client.tokenize([{"role": "user", "content": "a"}]) == (97,)
    assert client.detokenize([97, 98]) == "ab"
    assert client.model_info().eos_token_ids == (3,)
    state = client.cluster_status()
    assert (state.queued_requests, state.executors[0].used_blocks) == (4, 25)
    client.abort("a", "b")
    assert server.aborted == ["a", "b"]


def test_orders_of_an_operator(server: FakeServer, client: Client) -> None:
    client.pause_executor("executor-0")
    client.resume_executor("executor-0")
    client.drain_executor("executor-0")
    assert server.orders == [("pause", "executor-0"), ("resume", "executor-0"), ("drain", "executor-0")]
    for order in (client.pause_executor, client.resume_executor, client.drain_executor):
        with pytest.raises(ExecutorNotFoundError, match="nobody"):
            order("nobody")


def test_nobody_listens() -> None:
    with Client("127.0.0.1:1") as client, pytest.raises(ConnectFailedError, match=r"cannot connect to 127\.0\.0\.1:1"):
        client.model_info()


def test_wait_ready(server: FakeServer, client: Client) -> None:
    client.wait_ready(timeout=5)
    server.health = health_pb2.HealthCheckResponse.NOT_SERVING
    with pytest.raises(UnavailableError, match="no executor"):
        client.wait_ready(timeout=0.3)

    def serve() -> None:
        server.health = health_pb2.HealthCheckResponse.SERVING

    threading.Timer(0.3, serve).start()
    began = time.monotonic()
    client.wait_ready()
    assert time.monotonic() - began >= 0.2


def test_wait_ready_when_nobody_listens() -> None:
    with Client("127.0.0.1:1") as client, pytest.raises(UnavailableError, match="cannot connect"):
        client.wait_ready(timeout=0.3)


def test_a_program_that_forgets_to_close_ends(server: FakeServer) -> None:
    # A channel that is left to the interpreter may wait for ever for a thread that is gone.
    server.stream = [start(), chunk(0, [4], "he", 0), SILENCE]
    command = [sys.executable, "-c", FORGETFUL, server.address]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert "Channel closed" in done.stdout
    assert done.stderr == ""
    assert server.cancelled.wait(CANCEL_SECONDS)
