"""The command line against a scripted server: text out, one error line, exit codes."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from baton_protos import generation_pb2 as pb
from tests.client.fake_server import SILENCE, FakeServer, chunk, end, failure, start

BATON = str(Path(sys.executable).with_name("baton"))
STREAM = [start(), chunk(0, [4], "he", 0), chunk(1, [5], "llo", 2), end(2, pb.FINISH_REASON_STOP)]


def command(*arguments: str) -> list[str]:
    return [BATON, *arguments]


def run(*arguments: str, stdin: str = "", **env: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        command(*arguments),
        input=stdin,
        capture_output=True,
        text=True,
        timeout=30,
        env={**os.environ, **env},
        check=False,
    )


@pytest.fixture
def talking(server: FakeServer) -> Iterator[FakeServer]:
    server.stream = list(STREAM)
    sample = pb.Sample(text="hello", token_ids=[4, 5], finish_reason=pb.FINISH_REASON_STOP)
    server.answer = pb.GenerateResponse(request_id="r", samples=[sample])
    yield server


def test_generate_prints_the_continuation(talking: FakeServer) -> None:
    done = run("generate", "hi", "--server", talking.address, "--temperature", "0", "--seed", "5")
    assert (done.returncode, done.stdout, done.stderr) == (0, "hello\n", "")
    request = talking.requests[0]
    assert (request.text, request.stop.max_tokens) == ("hi", 128)
    assert (request.sampling.temperature, request.sampling.seed) == (0.0, 5)


def test_generate_without_streaming_and_with_echo(talking: FakeServer) -> None:
    done = run("generate", "hi ", "--server", talking.address, "--no-stream", "--echo")
    assert (done.returncode, done.stdout) == (0, "hi hello\n")


def test_generate_chat_from_stdin(talking: FakeServer) -> None:
    done = run("generate", "-", "--chat", "--server", talking.address, stdin="hi")
    assert done.stdout == "hello\n"
    assert talking.requests[0].chat.messages[0] == pb.ChatMessage(role="user", content="hi")


def test_generate_json(talking: FakeServer) -> None:
    done = run("generate", "hi", "--server", talking.address, "--json")
    answer = json.loads(done.stdout)
    assert (answer["text"], answer["token_ids"], answer["finish_reason"]) == ("hello", [4, 5], "stop")


def test_every_flag_reaches_its_field(talking: FakeServer) -> None:
    flags = (
        "--min-p 0.125 --repetition-penalty 1.5 --frequency-penalty -0.5 --presence-penalty 1 --logit-bias 7=-1.5 "
        "--logit-bias 8=2 --allowed-id 7 --allowed-id 8 --banned-id 8 --stop end --stop fin --include-stop --stop-id 3 "
        "--ignore-eos --min-tokens 2 --n 2 --logprobs 0 --prompt-logprobs 1 --timings --priority -3 "
        "--queue-timeout 1.5 --cache-salt x --json"
    )
    done = run("generate", "hi", "--server", talking.address, *flags.split())
    assert (done.returncode, done.stderr) == (0, "")
    assert talking.requests[0] == pb.GenerateRequest(
        text="hi",
        sampling=pb.SamplingParams(
            min_p=0.125,
            repetition_penalty=1.5,
            frequency_penalty=-0.5,
            presence_penalty=1,
            logit_bias={7: -1.5, 8: 2},
            allowed_token_ids=[7, 8],
            banned_token_ids=[8],
        ),
        stop=pb.StopConditions(
            max_tokens=128,
            min_tokens=2,
            stop_strings=["end", "fin"],
            include_stop=True,
            stop_token_ids=[3],
            ignore_eos=True,
        ),
        output=pb.OutputOptions(logprobs=0, prompt_logprobs=1, timings=True),
        n=2,
        priority=-3,
        queue_timeout_ms=1500,
        cache_salt="x",
    )


def test_several_samples(talking: FakeServer) -> None:
    texts = [chunk(0, [4], f"text {i}", 0, sample=i) for i in range(2)]
    talking.stream = [start(sample_seeds=[7, 8]), *texts, end(1, sample=1), end(1)]
    done = run("generate", "hi", "--server", talking.address, "--n", "2")
    assert done.stdout == "==> sample 0 <==\ntext 0\n==> sample 1 <==\ntext 1\n"
    answer = json.loads(run("generate", "hi", "--server", talking.address, "--n", "2", "--json").stdout)
    assert answer["text"] == "text 0" and [one["text"] for one in answer["samples"]] == ["text 0", "text 1"]


def test_log_probabilities_in_json(talking: FakeServer) -> None:
    token = pb.TokenLogprobs(token_id=4, logprob=-0.5, rank=1, top_token_ids=[4], top_logprobs=[-0.5], top_texts=["he"])
    talking.stream = [start(), chunk(0, [4], "", 0, logprobs=[token]), end(1)]
    answer = json.loads(run("generate", "hi", "--server", talking.address, "--logprobs", "1", "--json").stdout)
    assert answer["cumulative_logprob"] == -0.5
    top = [{"token_id": 4, "logprob": -0.5, "text": "he"}]
    assert answer["logprobs"] == [{"token_id": 4, "logprob": -0.5, "rank": 1, "text": "", "top": top}]
    assert answer.keys().isdisjoint({"timings", "samples", "prompt_logprobs", "stop_string"})


def test_a_refused_request_is_one_line_and_exit_1(server: FakeServer) -> None:
    server.stream = [failure(grpc.StatusCode.INVALID_ARGUMENT, "sampling.top_p: must be\nabove 0")]
    done = run("generate", "hi", "--server", server.address)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "error: sampling.top_p: must be above 0\n"


@pytest.mark.parametrize("arguments", [("generate", "hi"), ("status",)])
def test_nobody_listens(arguments: tuple[str, ...]) -> None:
    done = run(*arguments, "--server", "127.0.0.1:1")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: cannot connect to 127.0.0.1:1")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "arguments",
    [
        ("generate",),
        ("generate", "hi", "--max-tokens", "0"),
        ("generate", "hi", "--logprobs", "1"),
        ("generate", "hi", "--logit-bias", "7"),
        ("nonsense",),
        ("cluster", "--executors", "0"),
    ],
)
def test_wrong_usage_is_exit_2(arguments: tuple[str, ...]) -> None:
    done = run(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert "Usage: baton" in done.stderr


def test_ctrl_c_cancels_and_exits_130(server: FakeServer) -> None:
    server.stream = [start(), chunk(0, [4], "he", 0), SILENCE]
    with subprocess.Popen(
        command("generate", "hi", "--server", server.address), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.read(2) == b"he"
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 130
        assert process.stderr.read() == b""
    assert server.cancelled.wait(5)


def test_a_reader_that_leaves_ends_it_quietly(server: FakeServer) -> None:
    server.stream = [start(), *(chunk(i, [4], "word ", 5 * i) for i in range(50_000)), end(50_000)]
    with subprocess.Popen(
        command("generate", "hi", "--server", server.address), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.read(10)
        process.stdout.close()
        assert process.wait(20) == 1
        assert process.stderr.read() == b""
    assert server.cancelled.wait(5)


def test_status(server: FakeServer) -> None:
    done = run("status", "--server", server.address, COLUMNS="40")
    assert done.returncode == 0
    headline, header, row = (line.split() for line in done.stdout.splitlines())
    assert headline[:2] == ["model", "fake,"] or headline[:2] == ["model", "fake"]
    assert header[:2] == ["executor", "device"]
    assert row[:6] == ["executor-0", "cpu", "0/256", "0", "25%", "0%"]
    assert row[-5:-2] == ["5", "7", "2/128"]  # handed over, stale, mismatches
    assert done.stdout.splitlines()[0].endswith("queued requests: 4 for up to 2.5 s")
    state = json.loads(run("status", "--server", server.address, "--json").stdout)
    assert state["model"]["vocab_size"] == 512
    assert state["cluster"]["executors"][0]["used_blocks"] == 25


def test_help_has_no_colour_codes_when_piped() -> None:
    for arguments in (("--help",), ("generate", "--help"), ("status", "--help"), ("cluster", "--help")):
        done = run(*arguments, NO_COLOR="1")
        assert done.returncode == 0
        assert "Usage: baton" in done.stdout and "\x1b" not in done.stdout


def test_version() -> None:
    assert run("--version").stdout.startswith("baton 0.")
