"""The command line against a real cluster, on a terminal where it makes a difference."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from baton import Client, LocalCluster
from tests.e2e.corpus import CorpusRequest
from tests.e2e.harness import eventually, is_idle
from tests.e2e.terminal import CTRL_C, CTRL_D, Terminal

BATON = str(Path(sys.executable).with_name("baton"))
PROMPT = r"\n> $"


def test_batch(cluster: LocalCluster, client: Client, requests: tuple[CorpusRequest, ...], tmp_path: Path) -> None:
    lines = [{"id": one.seed, "token_ids": one.prompt, "seed": one.seed, "max_tokens": 6} for one in requests]
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("\n".join(json.dumps(line) for line in lines) + '\n{"prompt": ""}\n')
    arguments = ("--server", cluster.address, "--input", str(source), "--output", str(output))
    done = subprocess.run([BATON, "generate", *arguments], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"line {len(lines) + 1}: text: ") and "\nerror: 1 of 65 requests" in done.stderr
    *results, failed = [json.loads(line) for line in output.read_text().splitlines()]
    assert failed.keys() == {"id", "error"}
    assert [one["id"] for one in results] == [one.seed for one in requests]
    for result, request in zip(results[:8], requests, strict=False):
        expected = client.generate(request.prompt, seed=request.seed, max_tokens=6)
        assert (tuple(result["token_ids"]), result["finish_reason"]) == (expected.token_ids, expected.finish_reason)


def test_batch_progress_is_on_the_terminal_only(cluster: LocalCluster, tmp_path: Path) -> None:
    source, output = tmp_path / "prompts.txt", tmp_path / "out.jsonl"
    source.write_text("a\nb\nc\n")
    arguments = ("--server", cluster.address, "--file", str(source), "--output", str(output), "--max-tokens", "8")
    with Terminal([BATON, "generate", *arguments]) as terminal:
        assert "3/3 requests" in terminal.wait_for(r"3/3 requests, +\d+ tokens/s")
        assert terminal.finish() == 0
    assert len(output.read_text().splitlines()) == 3


def test_chat_on_a_terminal(cluster: LocalCluster, client: Client) -> None:
    command = [BATON, "chat", "--server", cluster.address, "--seed", "3", "--max-tokens", "1000"]
    with Terminal(command) as terminal:
        assert "Ctrl-D leaves." in terminal.wait_for(PROMPT)
        terminal.press("hello\r")
        terminal.wait_for(r"hello\n[\s\S]{80}")
        terminal.press(CTRL_C)
        assert re.search(r"\n\[\d+ tokens, [\d.]+ tokens/s, stopped\]\n> $", terminal.wait_for(PROMPT))
        assert eventually(lambda: is_idle(client.cluster_status()), 10.0)
        terminal.press("/nope\r")
        assert "There is no /nope" in terminal.wait_for(PROMPT)
        terminal.press("half a line")
        terminal.wait_for("half a line")  # now the terminal leaves Ctrl-C to the program
        terminal.press(CTRL_C)
        assert "Ctrl-D leaves." in terminal.wait_for(PROMPT)
        terminal.press("/reset\r")
        assert "forgotten" in terminal.wait_for(PROMPT)
        terminal.press(CTRL_D)
        assert terminal.finish() == 0


def test_chat_from_a_pipe(cluster: LocalCluster) -> None:
    arguments = ("--server", cluster.address, "--max-tokens", "5", "--system", "Be brief.")
    done = subprocess.run(
        [BATON, "chat", *arguments], input="one\ntwo\n", capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.endswith("\n") and "\x1b" not in done.stdout


@pytest.mark.parametrize("arguments", [(), ("--json",)])
def test_watching_the_status(cluster: LocalCluster, arguments: tuple[str, ...]) -> None:
    pattern = r'"scheduler_id"' if arguments else r"executor-0\W.*\n"
    with Terminal([BATON, "status", "--watch", "--server", cluster.address, *arguments]) as terminal:
        terminal.wait_for(pattern)
        terminal.wait_for(pattern)
        terminal.press(CTRL_C)
        assert terminal.finish() == 130
