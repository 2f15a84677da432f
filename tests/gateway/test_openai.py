"""OpenAI's HTTP API, through the real gateway and with the real client."""

import json
import os
import shutil
import signal
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from baton import Client
from tests.e2e.harness import descendants, eventually, is_idle
from tests.foreign import ForeignScript

from .conftest import Gateway

PROMPT = "def add(a, b):"
MESSAGES = [{"role": "user", "content": "Write a function."}]
SCHEMA = {
    "type": "object",
    "properties": {"size": {"type": "integer", "minimum": 0, "maximum": 99}, "ok": {"type": "boolean"}},
    "required": ["size", "ok"],
    "additionalProperties": False,
}


def joined(events: list[dict[str, Any]], index: int = 0) -> str:
    choices = [choice for event in events for choice in event["choices"] if choice["index"] == index]
    return "".join(choice.get("text") or (choice.get("delta") or {}).get("content") or "" for choice in choices)


def test_the_model_is_listed(gateway: Gateway, openai: ForeignScript) -> None:
    assert openai.call("models") == [gateway.model] == ["tiny_python"]


def test_completions_are_what_the_cluster_generates(gateway: Gateway, openai: ForeignScript, cluster: Client) -> None:
    asked = {"model": gateway.model, "prompt": PROMPT, "max_tokens": 40, "temperature": 0}
    own = cluster.generate(PROMPT, max_tokens=40, temperature=0)
    whole = openai.call("completion", **asked)
    assert whole["choices"][0]["text"] == own.text
    assert whole["choices"][0]["finish_reason"] == "length"
    assert whole["usage"]["completion_tokens"] == 40
    assert whole["usage"]["prompt_tokens"] == own.usage.prompt_tokens
    events = openai.call("completion_stream", **asked)
    assert len(events) > 3
    assert joined(events) == own.text


def test_sampling_is_passed_on(gateway: Gateway, openai: ForeignScript, cluster: Client) -> None:
    sampling = {"temperature": 0.8, "top_p": 0.9, "seed": 11, "frequency_penalty": 0.5}
    extra = {"top_k": 20, "min_p": 0.05, "repetition_penalty": 1.1}
    own = cluster.generate(PROMPT, max_tokens=30, **sampling, **extra)
    answer = openai.call("completion", model=gateway.model, prompt=PROMPT, max_tokens=30, **sampling, extra_body=extra)
    assert answer["choices"][0]["text"] == own.text


def test_chat(gateway: Gateway, openai: ForeignScript) -> None:
    asked = {"model": gateway.model, "messages": MESSAGES, "max_tokens": 30, "temperature": 0}
    whole = openai.call("chat", **asked)
    text = whole["choices"][0]["message"]["content"]
    assert text
    events = openai.call("chat_stream", **asked)
    assert joined(events) == text
    reasons = [choice["finish_reason"] for event in events for choice in event["choices"]]
    assert [reason for reason in reasons if reason] == [whole["choices"][0]["finish_reason"]]
    assert events[-1]["usage"] == whole["usage"]


@pytest.mark.parametrize("function", ["completion", "completion_stream"])
def test_several_samples(function: str, gateway: Gateway, openai: ForeignScript) -> None:
    asked = {"model": gateway.model, "prompt": PROMPT, "max_tokens": 20, "temperature": 1.0, "seed": 5, "n": 2}
    answer = openai.call(function, **asked)
    events = answer if isinstance(answer, list) else [answer]
    texts = [joined(events, index) for index in range(2)]
    assert texts[0] != texts[1] and all(texts)
    reasons = [choice["finish_reason"] for event in events for choice in event["choices"] if choice["finish_reason"]]
    assert len(reasons) == 2


def test_log_probabilities(gateway: Gateway, openai: ForeignScript, cluster: Client) -> None:
    asked = {"model": gateway.model, "messages": MESSAGES, "max_tokens": 5, "temperature": 0}
    answer = openai.call("chat", **asked, logprobs=True, top_logprobs=3)
    (choice,) = answer["choices"]
    content = choice["logprobs"]["content"]
    assert "".join(one["token"] for one in content) == choice["message"]["content"]
    for one in content:
        values = [top["logprob"] for top in one["top_logprobs"]]
        assert len(values) == 3 and values == sorted(values, reverse=True)
        assert one["logprob"] == pytest.approx(values[0])  # greedy
    own = cluster.generate([*MESSAGES], max_tokens=5, temperature=0, logprobs=0)
    assert [one["logprob"] for one in content] == pytest.approx([one.logprob for one in own.logprobs], abs=1e-5)


@pytest.mark.parametrize("function", ["completion", "completion_stream"])
def test_stop_strings(function: str, gateway: Gateway, openai: ForeignScript, cluster: Client) -> None:
    full = cluster.generate(PROMPT, max_tokens=40, temperature=0).text
    stop = full[20:26]
    asked = {"model": gateway.model, "prompt": PROMPT, "max_tokens": 40, "temperature": 0, "stop": [stop]}
    answer = openai.call(function, **asked)
    events = answer if isinstance(answer, list) else [answer]
    assert joined(events) == full[: full.index(stop)]
    reasons = [choice["finish_reason"] for event in events for choice in event["choices"] if choice["finish_reason"]]
    assert reasons == ["stop"]


def test_json_schema(gateway: Gateway, openai: ForeignScript) -> None:
    wanted = {"type": "json_schema", "json_schema": {"name": "thing", "schema": SCHEMA, "strict": True}}
    asked = {"model": gateway.model, "messages": MESSAGES, "max_tokens": 60, "response_format": wanted}
    for seed in range(3):
        answer = openai.call("chat", **asked, seed=seed)
        (choice,) = answer["choices"]
        assert choice["finish_reason"] == "stop"
        jsonschema.validate(json.loads(choice["message"]["content"]), SCHEMA)


@pytest.mark.parametrize(
    ("change", "status", "word"),
    [
        ({"temperature": -3}, 400, "temperature"),
        ({"extra_body": {"top_k": 100_000}}, 400, "top_k"),
        ({"max_tokens": 100_000}, 400, "tokens"),
        ({"prompt": "word " * 5000}, 400, ""),
        ({"model": "another"}, 404, "another"),
    ],
    ids=["temperature", "top_k", "max_tokens", "long prompt", "model"],
)
def test_bad_requests(change: dict[str, Any], status: int, word: str, gateway: Gateway, openai: ForeignScript) -> None:
    asked = {"model": gateway.model, "prompt": PROMPT, "max_tokens": 10, **change}
    code, message = openai.call("error", **asked)
    assert code == status, message
    assert word in message


def test_a_client_who_leaves_frees_blocks(gateway: Gateway, openai: ForeignScript, cluster: Client) -> None:
    many = {"model": gateway.model, "prompt": PROMPT, "max_tokens": 1900, "temperature": 0}
    before = cluster.cluster_status().executors[0].steps
    openai.call("leave", after=3, **many, extra_body={"ignore_eos": True})
    assert eventually(lambda: is_idle(cluster.cluster_status()), seconds=20)
    assert cluster.cluster_status().executors[0].steps - before < 1900


def test_streams_outlive_executors(gateway: Gateway, openai: ForeignScript, cluster: Client) -> None:
    asked = {"model": gateway.model, "prompt": PROMPT, "max_tokens": 1500, "temperature": 0}
    asked["extra_body"] = {"ignore_eos": True}
    undisturbed = cluster.generate(PROMPT, max_tokens=1500, temperature=0, ignore_eos=True).text
    events: list[dict[str, Any]] = []
    reader = threading.Thread(target=lambda: events.extend(openai.call("completion_stream", **asked)))
    before = cluster.cluster_status().executors[0].steps
    reader.start()
    while cluster.cluster_status().executors[0].steps < before + 50:
        time.sleep(0.02)
    os.kill(executor_pid(gateway), signal.SIGKILL)
    reader.join()
    assert joined(events) == undisturbed


def executor_pid(gateway: Gateway) -> int:
    (pid,) = [
        pid
        for pid in descendants(gateway.process.pid)
        if b"executor_service" in Path(f"/proc/{pid}/cmdline").read_bytes()
    ]
    return pid


@pytest.mark.skipif(shutil.which("curl") is None, reason="there is no curl")
def test_curl(gateway: Gateway) -> None:
    body = json.dumps({"model": gateway.model, "prompt": PROMPT, "max_tokens": 5, "stream": True})
    command = ["curl", "-sS", "--noproxy", "*", "-H", "content-type: application/json", "-d", body]
    answer = subprocess.run(
        [*command, f"{gateway.url}/completions"], capture_output=True, text=True, timeout=60, check=True
    ).stdout
    lines = [line.removeprefix("data: ") for line in answer.splitlines() if line]
    assert lines[-1] == "[DONE]"
    assert json.loads(lines[-2])["choices"][0]["finish_reason"] == "length"
