"""``baton chat`` with lines from a pipe against a scripted server."""

import os
import re
import subprocess

import grpc
import pytest

from baton_protos import generation_pb2 as pb
from tests.client.fake_server import FakeServer, chunk, end, failure, start
from tests.client.test_cli import BATON, run
from tests.e2e.terminal import Terminal


@pytest.fixture(autouse=True)
def chatting(server: FakeServer) -> None:
    server.model.has_chat_template = True
    server.model.max_total_tokens = 100
    server.stream = [start(), chunk(0, [4], "he", 0), chunk(1, [5], "llo", 2), end(2)]


def turns(request: pb.GenerateRequest) -> list[tuple[str, str]]:
    return [(message.role, message.content) for message in request.chat.messages]


def test_lines_are_turns(server: FakeServer) -> None:
    done = run("chat", "--server", server.address, "--temperature", "0", "--seed", "5", stdin="one\n\ntwo")
    assert (done.returncode, done.stdout, done.stderr) == (0, "hello\nhello\n", "")
    first, second = server.requests
    assert turns(first) == [("user", "one")]
    assert turns(second) == [("user", "one"), ("assistant", "hello"), ("user", "two")]
    assert (first.sampling.temperature, first.sampling.seed) == (0.0, 5)


def test_commands(server: FakeServer) -> None:
    lines = "one\n/system Be brief.\ntwo\n/reset\nthree\n/system\n /etc\n/nonsense\n/help\n/quit\nfour\n"
    done = run("chat", "--server", server.address, "--system", "Be kind.", stdin=lines)
    assert (done.returncode, done.stdout) == (0, "hello\n" * 4)
    one, two, three, fourth = server.requests
    assert turns(one) == [("system", "Be kind."), ("user", "one")]
    assert turns(two) == [("system", "Be brief."), ("user", "one"), ("assistant", "hello"), ("user", "two")]
    assert turns(three) == [("system", "Be brief."), ("user", "three")]
    assert turns(fourth) == [("user", "three"), ("assistant", "hello"), ("user", " /etc")]
    assert "There is no /nonsense; /help lists the commands.\n" in done.stderr
    assert "/reset   " in done.stderr
    assert "\x1b" not in done.stderr


def test_the_answer_is_as_long_as_fits(server: FakeServer) -> None:
    run("chat", "--server", server.address, stdin="x" * 60)
    assert server.requests[0].stop.max_tokens == 40
    run("chat", "--server", server.address, "--max-tokens", "7", stdin="x" * 60)
    assert server.requests[1].stop.max_tokens == 7


def test_a_full_context_is_an_error(server: FakeServer) -> None:
    done = run("chat", "--server", server.address, stdin="x" * 100)
    assert (done.returncode, done.stdout, len(server.requests)) == (1, "", 0)
    assert done.stderr == "error: the conversation fills the model's 100 tokens; /reset forgets it\n"


def test_the_first_error_ends_a_pipe(server: FakeServer) -> None:
    server.stream = [start(), chunk(0, [4], "he", 0), failure(grpc.StatusCode.INTERNAL, "broken")]
    done = run("chat", "--server", server.address, stdin="one\ntwo\n")
    assert (done.returncode, done.stdout, done.stderr) == (1, "he\n", "error: broken\n")
    assert len(server.requests) == 1


def test_an_error_does_not_end_a_terminal(server: FakeServer) -> None:
    good, server.stream = server.stream, [start(), chunk(0, [4], "he", 0), failure(grpc.StatusCode.INTERNAL, "broken")]
    with Terminal([BATON, "chat", "--server", server.address]) as terminal:
        terminal.wait_for("\n> $")
        terminal.press("one\r")
        assert terminal.wait_for("\n> $") == "one\nhe\nerror: broken\n> "
        server.stream = good
        terminal.press("two\r")
        assert re.search(r"^two\nhello\n\[2 tokens.*\]\n> $", terminal.wait_for("\n> $"))
        terminal.press("/quit\r")
        assert terminal.finish() == 0


def test_input_that_is_no_text(server: FakeServer) -> None:
    strict = {**os.environ, "PYTHONIOENCODING": "utf-8:strict"}
    command = [BATON, "chat", "--server", server.address]
    done = subprocess.run(command, input=b"\xff\n", capture_output=True, timeout=30, check=False, env=strict)
    assert (done.returncode, done.stdout) == (1, b"")
    assert done.stderr == b"error: the input is not UTF-8: invalid start byte at byte 0\n"


def test_a_model_without_a_chat_template(server: FakeServer) -> None:
    server.model.has_chat_template = False
    done = run("chat", "--server", server.address, stdin="one\n")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: the checkpoint of fake has no chat template")


def test_nobody_listens() -> None:
    done = run("chat", "--server", "127.0.0.1:1", stdin="one\n")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
