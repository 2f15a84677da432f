"""``baton generate`` with files of requests against a scripted server."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from baton.batch import BatchRequest
from baton.cli import app
from baton.cli.request_lines import json_lines, prompt_lines
from baton.errors import InvalidRequestError
from baton.options import GenerateOptions
from baton.values import ChatMessage
from tests.client.fake_server import FakeServer
from tests.client.test_batch import echo
from tests.client.test_cli import run


def parsed(line: str | bytes) -> BatchRequest | InvalidRequestError:
    (one,) = json_lines(line.encode() if isinstance(line, str) else line, {"max_tokens": 128})
    return one.request


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ('{"prompt": "hi"}', BatchRequest("hi", {"max_tokens": 128})),
        ('{"token_ids": [1, 2], "max_tokens": 4}', BatchRequest([1, 2], {"max_tokens": 4})),
        ('{"prompt": "hi", "seed": null, "top_p": 1}', BatchRequest("hi", {"max_tokens": 128, "top_p": 1})),
        (
            '{"messages": [{"role": "user", "content": "hi"}], "ignore_eos": true, "stop_token_ids": [3]}',
            BatchRequest(
                [{"role": "user", "content": "hi"}], {"max_tokens": 128, "ignore_eos": True, "stop_token_ids": [3]}
            ),
        ),
        (
            '{"prompt": "a", "n": 2, "stop": ["x"], "logit_bias": {"7": -1}, "logprobs": 3, "queue_timeout": 1.5}',
            BatchRequest(
                "a",
                {
                    "max_tokens": 128,
                    "n": 2,
                    "stop": ["x"],
                    "logit_bias": {7: -1},
                    "logprobs": 3,
                    "queue_timeout": 1.5,
                },
            ),
        ),
        (
            '{"prompt": "a", "stop": "x", "tenant": "us"}',
            BatchRequest("a", {"max_tokens": 128, "stop": "x", "tenant": "us"}),
        ),
    ],
)
def test_lines_become_requests(line: str, expected: BatchRequest) -> None:
    assert parsed(line) == expected


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("nonsense", "not JSON"),
        (b"\xff\xfe", "not UTF-8"),
        ("[" * 100_000, "nested too deeply"),
        ("[1]", "not a JSON object"),
        ("{}", "exactly one of prompt, token_ids, messages"),
        ('{"prompt": "a", "token_ids": [1]}', "exactly one of"),
        ('{"prompt": 3}', "prompt: must be text"),
        ('{"prompt": null}', "prompt: must be text"),
        ('{"token_ids": "abc"}', "token_ids: must be a list"),
        ('{"token_ids": [true]}', "token_ids: must be a list of whole numbers"),
        ('{"messages": []}', "messages: must be objects"),
        ('{"messages": [3]}', "messages: must be objects"),
        ('{"prompt": "a", "max_token": 3}', "max_token: no such field; there are id, prompt"),
        ('{"prompt": "a", "temperature": true}', "temperature: must be a number"),
        ('{"prompt": "a", "seed": 1.5}', "seed: must be a whole number"),
        ('{"prompt": "a", "logit_bias": {"x": 1}}', "logit_bias: names must be token ids"),
        ('{"prompt": "a", "logit_bias": [1]}', "logit_bias: must be an object"),
        ('{"prompt": "a", "stop": 3}', "stop: must be text"),
        ('{"prompt": "a", "ignore_eos": 1}', "ignore_eos: must be true or false"),
        ('{"prompt": "a", "stop_token_ids": ["x"]}', "stop_token_ids: must be a list of whole numbers"),
    ],
)
def test_what_is_wrong_with_a_line(line: str | bytes, complaint: str) -> None:
    request = parsed(line)
    assert isinstance(request, InvalidRequestError)
    assert complaint in request.message


def test_a_line_may_have_every_option() -> None:
    for name in GenerateOptions.__annotations__:
        line = json.dumps({"prompt": "a", name: []}) if name != "stop" else '{"prompt": "a", "stop": 3}'
        request = parsed(line)
        assert isinstance(request, BatchRequest) or "no such field" not in request.message


def test_names_and_numbers_of_lines() -> None:
    content = b'{"prompt": "a"}\n\n  \r\n{"id": "x", "prompt": "b"}\r\n{"id": [1], "prompt": 3}'
    assert [(line.number, line.id) for line in json_lines(content, {})] == [(1, 1), (4, "x"), (5, [1])]


def test_lines_of_prompts() -> None:
    lines = prompt_lines("a\r\n\n  b\u2028c \n".encode(), {"seed": 1}, chat=False)
    assert [line.request for line in lines] == [
        BatchRequest("a", {"seed": 1}),
        BatchRequest("  b\u2028c ", {"seed": 1}),
    ]
    (message,) = prompt_lines(b"hi", {}, chat=True)
    assert message.request == BatchRequest([ChatMessage("user", "hi")], {})
    (broken,) = prompt_lines(b"\xff", {}, chat=False)
    assert isinstance(broken.request, InvalidRequestError)


@pytest.fixture
def echoing(server: FakeServer) -> FakeServer:
    server.answer = echo
    return server


def results(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def test_a_file_of_requests(echoing: FakeServer, tmp_path: Path) -> None:
    requests, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    prompts = [f"p{index}" for index in range(40)]
    requests.write_text("".join(json.dumps({"prompt": prompt, "id": prompt}) + "\n" for prompt in prompts))
    arguments = ("--input", str(requests), "--output", str(output), "--concurrency", "3", "--seed", "9")
    done = run("generate", *arguments, "--server", echoing.address)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    written = results(output.read_text())
    assert [(one["id"], one["text"]) for one in written] == [(prompt, prompt.upper()) for prompt in prompts]
    assert written[0] == {
        "id": "p0",
        "text": "P0",
        "token_ids": [7],
        "finish_reason": "length",
        "usage": {"prompt_tokens": 0, "cached_tokens": 0, "completion_tokens": 1},
        "seed": 0,
    }
    assert 1 < echoing.most_running <= 3
    assert {(request.sampling.seed, request.stop.max_tokens) for request in echoing.requests} == {(9, 128)}


def test_bad_lines_are_reported_and_do_not_stop_the_others(echoing: FakeServer) -> None:
    lines = '{"prompt": "a"}\nnonsense\n\n{"id": "r", "prompt": "bad"}\n{"prompt": "b"}\n'
    done = run("generate", "--input", "-", "--server", echoing.address, stdin=lines)
    assert done.returncode == 1
    first, second, third, fourth = results(done.stdout)
    assert (first["text"], fourth["text"], fourth["id"]) == ("A", "B", 5)
    assert second == {"id": 2, "error": "not JSON: Expecting value at column 1"}
    assert third == {"id": "r", "error": "text: is bad"}
    assert done.stderr.splitlines() == [
        "line 2: not JSON: Expecting value at column 1",
        "line 4: text: is bad",
        "error: 2 of 4 requests failed",
    ]


def test_a_file_of_prompts(echoing: FakeServer, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("one\n\ntwo\n")
    done = run("generate", "--file", str(prompts), "--server", echoing.address)
    assert (done.returncode, done.stdout, done.stderr) == (0, "==> one <==\nONE\n==> two <==\nTWO\n", "")
    done = run("generate", "--file", "-", "--json", "--chat", "--server", echoing.address, stdin="one\ntwo")
    assert [one["id"] for one in results(done.stdout)] == [1, 2]
    assert {request.chat.messages[0].content for request in echoing.requests[2:]} == {"one", "two"}


def test_nothing_to_run(echoing: FakeServer) -> None:
    done = run("generate", "--input", "-", "--server", echoing.address, stdin="\n")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_files_that_cannot_be_used(echoing: FakeServer, tmp_path: Path) -> None:
    missing = str(tmp_path / "missing" / "file")
    done = run("generate", "--input", missing, "--server", echoing.address)
    assert (done.returncode, done.stderr) == (1, f"error: {missing}: No such file or directory\n")
    done = run("generate", "--input", "-", "--output", missing, "--server", echoing.address, stdin='{"prompt": "a"}')
    assert (done.returncode, done.stderr) == (1, f"error: {missing}: No such file or directory\n")


def test_nobody_listens_and_nothing_is_overwritten(tmp_path: Path) -> None:
    output = tmp_path / "results.jsonl"
    output.write_text("precious")
    arguments = ("--input", "-", "--output", str(output), "--server", "127.0.0.1:1")
    done = run("generate", *arguments, stdin='{"prompt": "a"}\n{"prompt": "b"}')
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert done.stderr.startswith("error: cannot connect")
    assert output.read_text() == "precious"


@pytest.mark.parametrize(
    "arguments",
    [
        ("hi", "--file", "x"),
        ("--file", "x", "--input", "x"),
        ("hi", "--output", "x"),
        ("--file", "x", "--echo"),
        ("--input", "x", "--chat"),
        ("--input", "x", "--concurrency", "0"),
    ],
)
def test_wrong_usage(arguments: tuple[str, ...]) -> None:
    done = CliRunner().invoke(app, ["generate", *arguments])
    assert (done.exit_code, done.stdout) == (2, "")
    assert "Usage:" in done.stderr
