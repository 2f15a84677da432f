"""``LLM``: batches on a cluster of its own, which goes when it goes."""

import os
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from baton import (
    LLM,
    BatchError,
    Client,
    ClusterError,
    Completion,
    FinishReason,
    InvalidRequestError,
    LocalCluster,
    SamplingParams,
)
from tests.e2e.corpus import CorpusRequest
from tests.e2e.harness import DEFAULTS, eventually, is_idle, processes_with

SETTINGS = {"threads": DEFAULTS["threads"], "num_blocks": DEFAULTS["num_blocks"]}
SHORT = SamplingParams(max_tokens=4, ignore_eos=True, seed=1)
STOP_SECONDS = 8.0
# Interrupted in the middle of a batch, or left to end without a word of good-bye.
PROGRAM = """
import atexit, sys
def ask():  # after everybody else has cleaned up
    try:
        llm.client.model_info()
    except Exception as error:
        print(error)
atexit.register(ask)
from baton import LLM, SamplingParams
llm = LLM(sys.argv[1], threads=1, num_blocks=2000)
print("ready", flush=True)
if sys.argv[2] == "work":
    llm.generate([[5, 6]] * 500, SamplingParams(max_tokens=1500, ignore_eos=True))
"""
INTERRUPTED_STARTS_SECONDS = 120.0
INTERRUPTED_STARTS = """
import random, signal, sys
from baton import LLM, SamplingParams
moments = random.Random(0)
interrupted = answers = 0
signal.signal(signal.SIGALRM, signal.default_int_handler)
with LLM(sys.argv[1], threads=1, num_blocks=2000) as llm:
    for _ in range(40):
        try:
            signal.setitimer(signal.ITIMER_REAL, moments.uniform(0.001, 0.03))
            llm.generate([[5, 6]] * 400, SamplingParams(max_tokens=1500, ignore_eos=True))
        except KeyboardInterrupt:
            interrupted += 1
        answers += bool(llm.client.model_info(timeout=20))
print(f"{interrupted} interrupted, {answers} answers")
"""


@pytest.fixture(scope="module")
def llm(checkpoint_f32: Path) -> Iterator[LLM]:
    with LLM(checkpoint_f32, **SETTINGS) as running:
        yield running


def test_same_tokens_as_a_shared_cluster(llm: LLM, client: Client, requests: tuple[CorpusRequest, ...]) -> None:
    sampling = [SamplingParams(seed=one.seed, max_tokens=12, ignore_eos=True, temperature=0.9) for one in requests]
    batch = llm.generate([one.prompt for one in requests], sampling)
    assert [one.prompt_token_ids for one in batch] == [one.prompt for one in requests]
    for completion, request, params in zip(batch, requests[:16], sampling, strict=False):
        assert completion.token_ids == client.generate(request.prompt, **params.options()).token_ids


def test_kinds_of_prompts(llm: LLM) -> None:
    chat = [{"role": "user", "content": "hi"}]
    separate = [llm.generate(prompt, SHORT) for prompt in ("hi", [5, 6], chat)]
    assert [len(completions) for completions in separate] == [1, 1, 1]
    together = llm.generate(["hi", [5, 6], chat], SHORT)
    assert [one.token_ids for one in together] == [completions[0].token_ids for completions in separate]
    assert llm.generate([], SHORT) == []
    assert llm.chat("hi", SHORT)[0].token_ids == together[2].token_ids
    assert [one.token_ids for one in llm.chat(["hi", chat], SHORT)] == [together[2].token_ids] * 2


def test_what_cannot_be_a_batch(llm: LLM) -> None:
    with pytest.raises(InvalidRequestError, match="2 prompts"):
        llm.generate(["a", "b"], [SHORT])
    with pytest.raises(InvalidRequestError, match="list of messages"):
        llm.generate({"role": "user", "content": "hi"})  # type: ignore[arg-type]
    with pytest.raises(InvalidRequestError, match="conversation"):
        llm.chat([[5, 6]])  # type: ignore[list-item]


def test_failures_come_after_the_others_have_finished(llm: LLM) -> None:
    with pytest.raises(BatchError, match=r"^2 of 4 prompts failed; prompt 1: token_ids: ") as caught:
        llm.generate(["a", [], [10**6], "b"], SHORT)
    first, empty, outside, last = caught.value.outcomes
    for finished in (first, last):
        assert isinstance(finished, Completion) and finished.finish_reason is FinishReason.LENGTH
    assert isinstance(empty, InvalidRequestError) and isinstance(outside, InvalidRequestError)
    assert caught.value.__cause__ is empty


def test_progress(llm: LLM, capfd: pytest.CaptureFixture[str]) -> None:
    llm.generate(["a"] * 3, SHORT)
    assert capfd.readouterr() == ("", "")
    llm.generate(["a"] * 3, SHORT, progress=True)
    shown = capfd.readouterr()
    assert "3/3 requests" in shown.err and "tokens/s" in shown.err
    assert "\x1b" not in shown.err and "\r" not in shown.err
    assert shown.out == ""


def test_a_prompt_after_an_interrupted_batch(llm: LLM) -> None:
    signal.signal(signal.SIGALRM, signal.default_int_handler)
    signal.setitimer(signal.ITIMER_REAL, 1.0)
    with pytest.raises(KeyboardInterrupt):
        llm.generate([[5, 6]] * 400, SamplingParams(max_tokens=1500, ignore_eos=True))
    assert eventually(lambda: is_idle(llm.client.cluster_status()), STOP_SECONDS)
    assert len(llm.generate("a", SHORT)[0].token_ids) == 4


def test_interrupted_while_requests_start(checkpoint_f32: Path) -> None:
    """gRPC loses count of a call whose start is broken off; the next call, or the end, would wait for ever."""
    program = [sys.executable, "-c", INTERRUPTED_STARTS, str(checkpoint_f32)]
    output = subprocess.run(program, timeout=INTERRUPTED_STARTS_SECONDS, check=True, capture_output=True, text=True)
    assert output.stdout == "40 interrupted, 40 answers\n" and not output.stderr


@pytest.mark.parametrize("how", ["interrupted", "ends"])
def test_nothing_outlives_the_program(checkpoint_f32: Path, how: str) -> None:
    mark = f"BATON_E2E_MARK_{uuid.uuid4().hex}"
    what = "work" if how == "interrupted" else "nothing"
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(checkpoint_f32), what],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, mark: "1"},
    ) as program:
        assert program.stdout is not None
        assert program.stdout.readline() == "ready\n"
        if how == "interrupted":
            assert len(processes_with(mark)) >= 3
            program.send_signal(signal.SIGINT)
        output, errors = program.communicate(timeout=STOP_SECONDS)
        assert program.returncode == (-signal.SIGINT if how == "interrupted" else 0)
        assert errors.strip().endswith("KeyboardInterrupt" if how == "interrupted" else "")
        assert output == "Cannot invoke RPC: Channel closed!\n"  # a channel that is left to the interpreter may hang
        assert not processes_with(mark)


def test_dropping_it_stops_the_cluster(checkpoint_f32: Path) -> None:
    llm = LLM(checkpoint_f32, **SETTINGS)
    address = llm.client.target
    del llm
    with Client(address) as client, pytest.raises(Exception, match="cannot connect"):
        client.model_info()


def test_a_cluster_that_does_not_start(tmp_path: Path) -> None:
    with pytest.raises(ClusterError, match=str(tmp_path)):
        LLM(tmp_path)


def test_the_end(llm: LLM, cluster: LocalCluster) -> None:
    """Last in this file: it is closed for good, others go on."""
    llm.close()
    llm.close()
    with pytest.raises(ClusterError, match="closed"):
        llm.generate("a")
    with Client(cluster.address) as client:
        assert client.model_info()
